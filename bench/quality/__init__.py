"""Quality: how far a model's next-token distributions and answers are from a reference's, on answers given images."""
