# SPDX-License-Identifier: Apache-2.0
"""Averages chosen after the run."""
