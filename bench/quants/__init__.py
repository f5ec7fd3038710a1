"""One checkpoint in many types: what each costs and what it saves."""
