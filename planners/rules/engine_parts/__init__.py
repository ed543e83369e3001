"""What the rules of several engines share: linear layers, attention, experts, embeddings."""
