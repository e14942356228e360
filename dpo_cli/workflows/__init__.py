"""Several stages in a row: rounds of DPO, a sweep over settings, a protocol of topics."""
