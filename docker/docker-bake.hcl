# The variants of the images, in one list. From the repository's root:
#
#   docker buildx bake -f docker/docker-bake.hcl                       the default variant's runtime image
#   docker buildx bake -f docker/docker-bake.hcl dev-cu130-py312       {runtime,dev,wheel}-{cu128-py312,cu130-py312,cpu-py312}
#   docker buildx bake -f docker/docker-bake.hcl wheel-cu128-py312     flash-attn's wheel, into wheels/cu128-pt210-py312
#   WHEELS=wheels docker buildx bake -f docker/docker-bake.hcl         the same image with the wheel that lies there
#
# A tag says what a compiled extension has to fit: CUDA, torch and Python.
variable "VARIANTS" {
  default = [
    { name = "cu128-py312", tag = "cu128-pt210-py312" },
    { name = "cu130-py312", tag = "cu130-pt211-py312" },
    { name = "cpu-py312", tag = "cpu-pt210-py312" },
  ]
}

# All of these may be set in the environment.
variable "IMAGE" { default = "flashlab" }
variable "COMMIT" { default = "" }
variable "WHEELS" { default = "" } # a folder of the wheels compiled before, in folders named like the tags
variable "UID" { default = "1000" }
variable "GID" { default = "1000" }
variable "MAX_JOBS" { default = "" } # empty: as many as the build's memory allows
variable "NVCC_THREADS" { default = "1" }
variable "FLASH_ATTN_CUDA_ARCHS" { default = "80;90;100;120" }

group "default" {
  targets = ["runtime-cu128-py312"]
}

target "_common" {
  context    = "."
  dockerfile = "assets/build/Dockerfile"
  args = {
    COMMIT                = COMMIT
    UID                   = UID
    GID                   = GID
    MAX_JOBS              = MAX_JOBS
    NVCC_THREADS          = NVCC_THREADS
    FLASH_ATTN_CUDA_ARCHS = FLASH_ATTN_CUDA_ARCHS
  }
}

target "image" {
  name     = "${stage}-${variant.name}"
  matrix   = { stage = ["runtime", "dev"], variant = VARIANTS }
  inherits = ["_common"]
  target   = stage
  args     = { VARIANT = variant.name, TAG = "${variant.tag}${stage == "dev" ? "-dev" : ""}" }
  tags     = ["${IMAGE}:${variant.tag}${stage == "dev" ? "-dev" : ""}"]
  contexts = WHEELS == "" || variant.name == "cpu-py312" ? {} : { wheel = "${WHEELS}/${variant.tag}" }
}

target "wheel" {
  name     = "wheel-${variant.name}"
  matrix   = { variant = VARIANTS }
  inherits = ["_common"]
  target   = "wheel"
  args     = { VARIANT = variant.name }
  output   = ["type=local,dest=wheels/${variant.tag}"]
}
