"""What a person reads: records, figures, the reproduction of the paper."""
