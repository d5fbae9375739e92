"""The two ways into a frozen model: `embedding` puts vectors into the input, `attention` adds keys and values."""
