"""The control plane: coordinator, its pure core, its journal, and the members' sessions."""
