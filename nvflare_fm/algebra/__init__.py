"""LoRA's algebra: products B @ A, inner products, leading directions. Knows torch alone."""
