"""The contract of a method, what is built of several of them, and the verbs that users call."""
