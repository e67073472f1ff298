"""Which chapter of Python's own manual each topic comes from: the labels of one task.

`pydoc_data.topics` does not say. The first four chapters are those of The Python Language
Reference, in its order; "built-in types" and "library" are The Python Standard Library.
"""

_TOPICS = {
    "lexical": "floating id-classes identifiers imaginary integers numbers strings",
    "data model": """attribute-access callable-types context-managers customization numeric-types
        objects sequence-types specialnames types""",
    "execution": "dynamic-features exceptions execmodel naming",
    "expressions": """atom-identifiers atom-literals attribute-references await binary bitwise
        booleans calls comparisons conversions dict exprlists in lambda lists operator-summary power
        shifting slicings subscriptions unary""",
    "statements": """assert assignment async augassign break class compound continue del else for
        function global if import nonlocal pass raise return try while with yield""",
    "built-in types": """bltin-code-objects bltin-ellipsis-object bltin-null-object
        bltin-type-objects specialattrs string-methods truth typesfunctions typesmapping
        typesmethods typesmodules typesseq typesseq-mutable""",
    "library": "debugger formatstrings",
}

# A later Python may have topics that are not here; the task then skips their passages.
CHAPTER_OF = {topic: chapter for chapter, topics in _TOPICS.items() for topic in topics.split()}
