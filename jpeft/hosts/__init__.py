"""Hosts: each connects methods to the models of one framework. `jpeft.hosts.base` has the contract; no other folder names a framework."""
