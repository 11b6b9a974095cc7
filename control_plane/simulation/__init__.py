"""A discrete-event simulator of a fleet: the policies of the control plane under a simulated clock."""
