# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import os

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from gplq_mm.integrations.mm.checkpoints.checkpoint_io import read_checkpoint, write_checkpoint


class Evil:
    """Runs a command when it is unpickled without protection."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Reach:
    """Asks for an attribute as a pickled `HistoryBuffer` does, but of something else."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / 'new' / 'a.pth'
    write_checkpoint(dict(state_dict=dict(a=torch.arange(3)), meta=dict(epoch=1)), path)
    checkpoint = read_checkpoint(path)
    assert torch.equal(checkpoint['state_dict']['a'], torch.arange(3))
    assert checkpoint['meta'] == dict(epoch=1)
    assert [p.name for p in path.parent.iterdir()] == ['a.pth']


def test_reads_what_mmengine_puts_into_its_checkpoints(tmp_path):
    history = HistoryBuffer([1.0, 3.0], [1, 1])
    extras = dict(loss=history, lr=np.float64(0.1), iter=np.int64(3), flag=np.bool_(True))
    torch.save(dict(state_dict={}, message_hub=extras), tmp_path / 'a.pth')
    loaded = read_checkpoint(tmp_path / 'a.pth')['message_hub']
    assert loaded['loss'].mean() == 2.0
    assert loaded['loss'].statistics('max') == 3.0
    assert (loaded['lr'], loaded['iter'], loaded['flag']) == (0.1, 3, True)


def test_bare_state_dict_is_a_checkpoint(tmp_path):
    torch.save(dict(a=torch.ones(2)), tmp_path / 'a.pth')
    assert torch.equal(read_checkpoint(tmp_path / 'a.pth')['state_dict']['a'], torch.ones(2))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    trace = tmp_path / 'trace'
    torch.save(dict(state_dict={}, evil=Evil(f'touch {trace}')), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='cannot be read as a checkpoint'):
        read_checkpoint(tmp_path / 'a.pth')
    assert not trace.exists()


def test_getattr_reaches_nothing_but_statistics(tmp_path):
    torch.save(dict(state_dict={}, evil=Reach()), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match="asks for '__init__'"):
        read_checkpoint(tmp_path / 'a.pth')


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'text'])
def test_damaged_file_is_one_clear_line(tmp_path, damage):
    path = tmp_path / 'a.pth'
    torch.save(dict(state_dict=dict(a=torch.ones(2000))), path)
    content = path.read_bytes()
    damaged = dict(truncated=content[: len(content) // 2], empty=b'', text=b'hello ' * 20)
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r'a\.pth cannot be read as a checkpoint: \w+') as caught:
        read_checkpoint(path)
    assert '\n' not in str(caught.value)


def test_missing_file_and_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=f'no checkpoint at {tmp_path}/a.pth'):
        read_checkpoint(tmp_path / 'a.pth')
    torch.save([1], tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='holds a list, not a checkpoint'):
        read_checkpoint(tmp_path / 'a.pth')


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    return tmp_path / 'home/hub/checkpoints'


def test_url_is_downloaded_once(tmp_path, hub):
    write_checkpoint(dict(state_dict=dict(a=torch.ones(1))), tmp_path / 'zoo.pth')
    url = (tmp_path / 'zoo.pth').as_uri()
    assert torch.equal(read_checkpoint(url)['state_dict']['a'], torch.ones(1))
    (tmp_path / 'zoo.pth').unlink()
    assert torch.equal(read_checkpoint(url)['state_dict']['a'], torch.ones(1))
    assert [p.name for p in hub.iterdir()] == ['zoo.pth']


def test_download_with_a_wrong_hash_or_address_is_refused(tmp_path, hub):
    write_checkpoint(dict(state_dict={}), tmp_path / 'zoo-00000000.pth')
    for url in ((tmp_path / 'zoo-00000000.pth').as_uri(), 'file:///absent/zoo.pth'):
        with pytest.raises(FileNotFoundError, match=f'cannot download {url} to .*load_from=PATH'):
            read_checkpoint(url)
    assert list(hub.iterdir()) == []


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / 'a.pth'
    write_checkpoint(dict(state_dict=dict(a=torch.ones(1))), path)
    with pytest.raises(Exception, match='pickle'):
        write_checkpoint(dict(state_dict=dict(a=lambda: None)), path)
    assert torch.equal(read_checkpoint(path)['state_dict']['a'], torch.ones(1))
    assert [p.name for p in tmp_path.iterdir()] == ['a.pth']
