"""What leaving data costs in privacy: events, their ε, each site's budget, and audits of an adapter."""
