"""The product W x of one linear layer on a CPU: a weight that is kept in 4 bits need not be multiplied in 4 bits.

The ways          ways.py       what they are, and what each reads
                  product.py    the layer's forward that takes one, and the copies it keeps
                  fastest.py    which one a layer of a base takes, and the copies that fit
                  measured.py   how fast each is here: raced once for a machine and a shape
As bitsandbytes   cpu_4bit.py   its own kernel, without the Python around it
In 4 bits         four_bit.py   codes and scales, and their product
                  four_bit_kernel.py  how they are read
In 16 bits        as_it_lies.py  a dense weight, by processors without AMX
                  vector_kernel.py  its loops, and those of 4 bits
By AMX            tiled.py      a few rows and a bfloat16 weight
                  amx_kernel.py  its loops, and those of a few rows in 4 bits
                  many.py       many rows, with what adapters add
                  amx_many_kernel.py  its loops
A dense copy      blocked.py    float32 in oneDNN's blocks
                  half.py       float16, by FBGEMM
"""
