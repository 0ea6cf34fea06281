// The C entry points that TensorRT's Python module links. It needs them to load; none is called.
// With this in place of libnvinfer, libnvinfer_plugin and libnvonnxparser, the module imports without a GPU.
#define ENTRY_POINT(name) void* name(void) { return 0; }

ENTRY_POINT(createInferBuilder_INTERNAL)
ENTRY_POINT(createInferRefitter_INTERNAL)
ENTRY_POINT(createInferRuntime_INTERNAL)
ENTRY_POINT(createNvOnnxParser_INTERNAL)
ENTRY_POINT(createNvOnnxParserRefitter_INTERNAL)
ENTRY_POINT(getBuilderPluginRegistry)
ENTRY_POINT(getNvOnnxParserVersion)
ENTRY_POINT(getPluginRegistry)
ENTRY_POINT(initLibNvInferPlugins)
