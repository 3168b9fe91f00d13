# SPDX-License-Identifier: Apache-2.0
"""Functions that read or replace what an optimizer state keeps."""
