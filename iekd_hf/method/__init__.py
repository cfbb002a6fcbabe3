"""The paper: factors, losses, the objective, and what trains. Knows no Trainer."""
