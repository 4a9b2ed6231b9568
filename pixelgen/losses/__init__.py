"""The training objective: one file per term, and one place that gates, weights and sums them."""
