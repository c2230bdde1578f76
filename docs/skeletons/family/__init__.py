"""Skeleton, a small pre-norm decoder with rotary positions. Say here which models the family covers, and cite their papers."""
