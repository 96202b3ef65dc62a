"""Whether a compressed model may be trusted: certificates on held-out data, and the ledger of its uses."""
