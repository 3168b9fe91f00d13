# SPDX-License-Identifier: Apache-2.0
"""Numerics, checks, the averaging kernel and the weightings."""
