"""What most descriptions and graphs are made of: the preset dictionary of DEFLATE. A part of the format: never changed.

The nearer to the end, the more frequent.
"""

_OPERATORS = (
    "QLinearConcat QLinearMul QLinearAveragePool QLinearGlobalAveragePool QLinearSigmoid QLinearLeakyRelu QLinearAdd "
    "QLinearMatMul QLinearConv QGemm ConvInteger MatMulInteger MatMulNBits DynamicQuantizeLinear DynamicQuantizeMatMul "
    "DynamicQuantizeLSTM QAttention EmbedLayerNormalization SkipLayerNormalization MultiHeadAttention Attention "
    "FastGelu BiasGelu Gelu Erf Tanh Sigmoid HardSigmoid HardSwish Swish Softmax LogSoftmax LayerNormalization "
    "InstanceNormalization GroupNormalization BatchNormalization GlobalAveragePool AveragePool MaxPool ReduceMean "
    "ReduceSum ReduceMax ArgMax TopK Where Equal Greater Less Not And Or Expand Tile Range Shape Size Gather "
    "GatherElements GatherND ScatterND Slice Split Squeeze Unsqueeze Concat Transpose Flatten Identity Constant "
    "ConstantOfShape Cast Pad Resize Upsample ConvTranspose LSTM GRU RNN Einsum Pow Sqrt Reciprocal Exp Log Neg Abs "
    "Sub Div Mul Add MatMul Clip LeakyRelu Relu DequantizeLinear QuantizeLinear Conv Gemm Reshape"
)
_ATTRIBUTES = (
    "activations direction bidirectional hidden_size num_heads epsilon momentum perm keepdims axes ends starts "
    "largest sorted exclude_outside coordinate_transformation_mode half_pixel nearest_mode approximate block_size "
    "ceil_mode count_include_pad auto_pad NOTSET K N bits accuracy_level channels_last to axis dilations strides "
    "group kernel_shape pads alpha beta transA transB allowzero"
)
_TEXT = (
    '{"format":"pt"}manifest.jsonREADME.mdparity.safetensorsplan.jsonprofile.jsoncertificate.jsonenvironment.json'
    '"bfloat16""float16""bool""int32""uint8""int8"attention_masktoken_type_idsinput_idslogits"sequence""length"'
    '"tuple","items":["list""dict","keys":["tensor","tensor"]{"files":{"main":["model.xml","model.bin"]},'
    '"runtime":"openvino","signature":'
    '{"dtype":"int64","name":"input_ids","shape":["batch","length"]},'
    '{"files":{"main":["model.onnx"]},"runtime":"onnxruntime","signature":{"input_structure":"tensor","inputs":'
    '[{"dtype":"float32","name":"input","shape":["batch",3,32,32]}],"output_structure":"tensor","outputs":'
    '[{"dtype":"float32","name":"output","shape":["batch",10]}]}}model.onnx'
)
_GRAPH = (
    b"B\x11\n\rcom.microsoft\x10\x01B\x0c\n\x07ai.onnx\x10\x14B\x04\n\x00\x10\x12"
    b"*\x13\n\tdilations@\x01@\x01j\x00\xa0\x01\x07*\x0c\n\x05group\x18\x01j\x00\xa0\x01\x02"
    b"*\x11\n\x07strides@\x02@\x02j\x00\xa0\x01\x07*\x0c\n\x04axis\x18\x01j\x00\xa0\x01\x02"
    b'\n;\n\x01u\n\x01r\n\x01s\n\x01j\n\x01g\n\x01h\n\x01v\n\x01h\x12\x01w\x1a\x01w"\nQLinearAdd2\x00:\rcom.microsoft'
    b'\n^\n\x01c\n\x01a\n\x01b\n\x01d\n\x01e\n\x01f\n\x01g\n\x01h\n\x01i\x12\x01j\x1a\x01j"\x0bQLinearConv'
    b"*\x17\n\x0ckernel_shape@\x03@\x03j\x00\xa0\x01\x07*\x13\n\x04pads@\x01@\x01@\x01@\x01j\x00\xa0\x01\x072\x00"
    b'\x08\n:\n/\n\x05input\n\x01a\x12\x01b\x1a\x01b"\x07Reshape*\x12\n\tallowzero\x18\x01j\x00\xa0\x01\x022\x00'
    b'\n(\n\x01b\n\x01c\n\x01d\x12\x01e\x1a\x01e"\x04Gemm*\x0f\n\x06transB\x18\x01j\x00\xa0\x01\x022\x00'
    b'\n\x11\n\x01e\x12\x01f\x1a\x01f"\x04Relu2\x00\n\x05\x12\x06output\x1a\x06output\x12\x01g'
    b"*\x07\x10\x01B\x01aJ\x00*\x07\x10\x02B\x01bJ\x00*\t\x08\x10\x10\x03B\x01fJ\x00*\t\x08\x10\x10\x01B\x01eJ\x00"
    b"*\x0b\x08\x10\x10\x06B\x01iJ\x00b\x00*\x11\x08\x10\x08\x10\x08\x03\x08\x03\x10\x03B\x01kJ\x00b\x00"
    b"*\x0b\x08\x02\x10\x07B\x01aJ\x00b\x00*\x0e\x08d\x08\xac\x02\x10\x01B\x01gJ\x00b\x00*\x0b\x08d\x10\x01B\x01hJ\x00b\x00"
    b"R\x00Z&\n\x05input\x12\x1b\n\x19\x08\x01\x12\x15\n\x07\x12\x05batch\n\x02\x08\x03\n\x02\x08 \n\x02\x08 \x1a\x00"
    b"b\x1f\n\x06output\x12\x13\n\x11\x08\x01\x12\r\n\x07\x12\x05batch\n\x02\x08\n\x1a\x00B\x04\n\x00\x10\x14"
)
VOCABULARY = _OPERATORS.encode() + _ATTRIBUTES.encode() + _TEXT.encode() + _GRAPH
