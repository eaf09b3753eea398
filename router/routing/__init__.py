"""From queries to weights, and from weights to a few merged variants."""
