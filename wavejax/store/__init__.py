"""The KV cache as a vector store: the wave index, the KV rows and the steady zone, in one state.

A KV row is one token's key and value for one kv head; a head is one kv head of one sequence. Five
numbers say where a token of a head is:

- position: in the text, from 0. RoPE and lengths count it, and the steady zone.
- store row: the position less the sinks. The row store has a KV row at each.
- index place: in cluster order. Codes, scales and `token_ids` have an entry at each; `token_ids`
  gives its store row.
- candidate place: in the list of tokens that one step ranks (`score_tokens`, `select_tokens`).
- slot: in the row cache, whose table maps store rows to slots and back.

`NO_ID` stands for none of them, and for no cluster; only the row cache's table has `EMPTY`.
"""
