"""The loop, loss, optimizer, metrics, callbacks and hang detection."""
