"""The benchmarks. They read labels, so nothing under router/ or merge/ may import them."""
