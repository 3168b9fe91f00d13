# SPDX-License-Identifier: Apache-2.0
"""Gradient transformations."""
