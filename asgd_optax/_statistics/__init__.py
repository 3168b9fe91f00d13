# SPDX-License-Identifier: Apache-2.0
"""Statistics of a stream of pytrees."""
