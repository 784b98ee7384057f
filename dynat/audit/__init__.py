"""Where does a number come from? ``python -m dynat.audit digits/dynat/0/aa`` checks every link."""
