"""The token MDP and its Gymnasium views."""
