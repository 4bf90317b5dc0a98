"""`lora-rt compose`, as one answer, side by side with its parts, or as a chat.

command.py  the command and its options      answer.py    one answer, streamed or as JSON
request.py  what was asked for, checked      compare.py   base, parts and composition side by side
chat.py     a conversation                   keyboard.py  what is typed at any time, also while an answer is shown
"""
