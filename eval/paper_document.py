def compact(r): return r
def draw(r, d): pass
def parts(r): return {}
