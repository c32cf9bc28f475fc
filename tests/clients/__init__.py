"""Every kind of client through a load balancer that is in a hurry: ``make clients``."""
