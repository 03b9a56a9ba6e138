"""The preset dictionary of deflated texts (RFC 1950, section 2.2).

What archives say about themselves begins alike: keys, usual names of tensors, usual shapes. A
deflated text may refer to this one as if it stood before it. It is part of the format: FORMAT.md
lists it, and it never changes within a major version.
"""

from __future__ import annotations

from typing import Final

#: what is likeliest stands last, where references to it are shortest.
_NAMES: Final = (
    '"U8",[',
    '"F64",[',
    '"I32",[',
    '"F16",[1024,512]],["',
    "encoder.decoder.transformer.h.0.cross_attention.c_attn.c_proj.mlp.dense_4h_to_h.lm_head.weight",
    "backbone.stages.0.blocks.0.block.dwconv.pwconv1.expand_conv.project_conv.se.depthwise."
    "pointwise.head.classifier.0.classifier.1.layer_scale.gamma.beta.relative_position_bias_table",
    'cls_token","F32",[1,1,192]],["pos_embed","F32",[1,197,192]],["patch_embed.proj.',
    'blocks.0.attn.proj.bias","F32",[192]],["blocks.0.attn.qkv.weight","F32",[576,192]],["blocks.0.'
    'mlp.fc1.bias","F32",[768]],["blocks.0.mlp.fc2.weight","F32",[192,768]],["blocks.0.norm1.bias',
    'model.embed_tokens.weight","BF16",[32000,2048]],["model.layers.0.input_layernorm.weight",'
    '"BF16",[4096]],["model.layers.0.mlp.down_proj.weight","BF16",[2048,5632]],["model.layers.0.'
    'mlp.gate_proj.weight","BF16",[5632,2048]],["model.layers.0.mlp.up_proj.weight","BF16",['
    '5632,2048]],["model.layers.0.post_attention_layernorm.weight","BF16",[4096]],["model.layers.0.'
    'self_attn.k_proj.weight","BF16",[256,2048]],["model.layers.0.self_attn.o_proj.weight",'
    '"BF16",[2048,2048]],["model.layers.0.self_attn.q_proj.weight","BF16",[4096,4096]],["'
    "model.layers.0.self_attn.v_proj.weight",
    'embeddings.LayerNorm.weight","F32",[384]],["embeddings.position_embeddings.weight","F32",['
    '512,384]],["embeddings.token_type_embeddings.weight","F32",[2,384]],["embeddings.'
    'word_embeddings.weight","F32",[30522,384]],["encoder.layer.0.attention.output.LayerNorm.bias',
    '","F32",[384]],["encoder.layer.0.attention.output.dense.weight","F32",[384,384]],["encoder.'
    'layer.0.attention.self.key.bias","F32",[768]],["encoder.layer.0.attention.self.query.weight',
    '","F32",[768,768]],["encoder.layer.0.attention.self.value.weight","F32",[768,768]],["encoder.'
    'layer.0.intermediate.dense.bias","F32",[3072]],["encoder.layer.0.output.dense.weight","F32",['
    '384,1536]],["pooler.dense.',
    'features.0.conv.0.0.weight","F32",[96,1,3,3]],["features.0.conv.0.1.num_batches_tracked',
    '","I64",[]],["layer1.0.downsample.0.weight","F32",[256,64,1,1]],["layer1.0.downsample.1.bias',
    '","F32",[1000]],["fc.weight","F32",[1000,2048]],["linear.bias","F32",[10]],["linear.weight',
    '","F32",[512]],["conv1.weight","F32",[64,3,7,7]],["bn1.num_batches_tracked","I64",[]],["bn1.',
    'running_var","F32",[256]],["bn3.running_mean","F32",[128]],["layer1.0.bn2.running_var","F32",['
    '16]],["layer1.0.bn1.weight","F32",[32]],["layer1.0.conv2.weight","F32",[32,16,3,3]],["layer1.'
    '0.bn1.bias","F32",[64]],["layer1.0.bn1.running_mean","F32",[64]],["layer1.0.conv1.weight',
    '","F32",[64,64,3,3]],["',
)
_KEYS: Final = (
    '],"aliases":{"metadata":{"format":"pt"},"files":[',
    '],"about":{"generator":"weightvid 0.1.0","recipe":"small","rule":"fine","mantissa_bits":11,'
    '"evaluation":"kl","slopes":{"1":0.95},"generator":"weightvid 0.1.0","recipe":"balanced",'
    '"mantissa_bits":11}}',
    ',"numbering":0,"axis":1,"shifts":[0,0],"escapes":1,"first":0,"count":4194304},{"id":5,"levels":"I8",'
    '"step":"0x1.96p-7","states":8,"sha256":"","sqnr_db":23.9,"video_bytes":',
    '"core":[[1,434,0],[2,447,0],[4,5535,0],[7,78796,0],[11,16821,0],[15,12333,0]],"tail":[[2,1285,'
    '0],[3,617,0],[4,',
    '"streams":[["raw",4],["deflate",20],["lzma2",2744],["deflate",864]]}',
    '{"items":[{"id":0},{"id":1},{"id":4},{"id":2},{"id":3},{"id":',
    '{"ribbon":[0],"frames":[[1275,12],[0,11]],"exact":[[1,5,[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,'
    '16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31,32,33,34,35,36,37,38,39,40,',
    '],"ends":[{"id":5,"sqnr_db":18.1},{"id":6,"sqnr_db":31.9},{"id":7,"sqnr_db":26.4},{"id":8,'
    '"sqnr_db":20.5},{"id":9,"sqnr_db":23.4},{"id":10}',
    '{"frame":0,"starts":[{"id":4,"step":"0x1.5p-6","states":8,"energies":32},{"id":13,"step":'
    '"0x1.8ep-7","energies":16},{"id":7,"step":"0x1.9cp-8","states":8,"energies":64},{"id":',
    '{"weightvid":[2,0],"must_understand":["track.codec"],"track":{"codec":"hevc","width":384,'
    '"height":256},"tensors":[["',
)  # fmt: skip
#: ASCII.
DICTIONARY: Final = "".join(_NAMES + _KEYS).encode("ascii")
