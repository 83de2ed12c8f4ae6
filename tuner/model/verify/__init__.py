"""One model against another."""
