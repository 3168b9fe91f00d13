# SPDX-License-Identifier: Apache-2.0
"""Functions that read or replace averages and statistics in an optimizer state."""
