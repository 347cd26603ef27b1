"""Context compression with sentinel tokens: spans, masks, a compressed cache, and the experiments around them."""
