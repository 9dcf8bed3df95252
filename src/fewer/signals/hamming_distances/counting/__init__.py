"""How matches are counted: letters, the three exact ways, what each costs, and what looks at fewer of them."""
