"""Text in, packed rows out: corpus (files -> documents), tokens (documents -> token set), stream (token set -> rows)."""
