"""Files to rows, messages, tokens, packs and micro-batches."""
