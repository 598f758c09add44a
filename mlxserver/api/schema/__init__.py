"""How requests are declared, validated and bounded."""
