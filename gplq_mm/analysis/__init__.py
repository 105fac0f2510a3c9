# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Cost, sensitivity, bit assignment, error figures and report of a quantized model."""

from .cost import MacCount, bit_operations, count_macs, model_bytes
from .report import (
    REPORT_NAME,
    format_start,
    format_table,
    read_json,
    report_table,
    scope_line,
    write_json,
)

__all__ = [
    'REPORT_NAME',
    'MacCount',
    'bit_operations',
    'count_macs',
    'format_start',
    'format_table',
    'model_bytes',
    'read_json',
    'report_table',
    'scope_line',
    'write_json',
]
