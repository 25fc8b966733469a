//! NVIDIA cards, as the driver lists them.

use std::ffi::{CStr, c_char, c_int};
use std::path::Path;

use libloading::{Library, Symbol};

use super::{Device, Listed};
use crate::failure::Advised;

const DRIVERS: [&str; 3] = ["libcuda.so.1", "libcuda.so", "nvcuda.dll"];
const COMPILERS: [&str; 4] = [
    "libnvrtc.so",
    "libnvrtc.so.13",
    "libnvrtc.so.12",
    "nvrtc64_120_0.dll",
];

/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`.
const COMPUTE_CAPABILITY_MAJOR: c_int = 75;

/// Asks the driver itself: Burn's own way in panics where there is no driver.
pub fn list() -> Result<Vec<Listed>, String> {
    // SAFETY: the names and signatures are those of the CUDA driver API (cuda.h), and every
    // buffer is as large as the call is told.
    unsafe {
        let open = |name: &&str| Library::new(*name).ok();
        let driver = DRIVERS.iter().find_map(open);
        let driver = driver.ok_or("cuda: no driver library (looked for libcuda.so.1)")?;
        let missing =
            |e: libloading::Error| format!("cuda: the driver library is incomplete ({e})");
        let init: Symbol<unsafe extern "C" fn(u32) -> c_int> =
            driver.get(b"cuInit").map_err(missing)?;
        let count: Symbol<unsafe extern "C" fn(*mut c_int) -> c_int> =
            driver.get(b"cuDeviceGetCount").map_err(missing)?;
        let name: Symbol<unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int> =
            driver.get(b"cuDeviceGetName").map_err(missing)?;
        let memory: Symbol<unsafe extern "C" fn(*mut usize, c_int) -> c_int> =
            driver.get(b"cuDeviceTotalMem_v2").map_err(missing)?;
        let attribute: Symbol<unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int> =
            driver.get(b"cuDeviceGetAttribute").map_err(missing)?;
        let status = init(0);
        if status != 0 {
            return Err(format!(
                "cuda: the driver does not start (cuInit returned {status})"
            ));
        }
        let mut total = 0;
        if count(&mut total) != 0 || total == 0 {
            return Err("cuda: the driver finds no card".into());
        }
        let mut cards = Vec::new();
        for index in 0..total {
            let mut text = [0 as c_char; 256];
            let mut bytes = 0;
            let mut major = 0;
            let named = name(text.as_mut_ptr(), 255, index) == 0;
            let sized = memory(&mut bytes, index) == 0;
            let known = attribute(&mut major, COMPUTE_CAPABILITY_MAJOR, index) == 0;
            cards.push(Listed {
                id: format!("cuda:{index}"),
                name: match named {
                    true => CStr::from_ptr(text.as_ptr()).to_string_lossy().into_owned(),
                    false => "unnamed".into(),
                },
                backend: "cuda".into(),
                kind: "discrete".into(),
                memory_bytes: sized.then_some(bytes as u64),
                dtypes: match known && major >= 8 {
                    true => vec!["f32", "f16", "bf16"], // from Ampere on
                    false => vec!["f32", "f16"],
                },
            });
        }
        Ok(cards)
    }
}

/// A card in use.
pub fn listed(index: usize) -> Listed {
    let listed = list().ok().and_then(|cards| cards.into_iter().nth(index));
    listed.unwrap_or_else(|| super::unlisted(format!("cuda:{index}"), "cuda"))
}

/// The run-time compiler and its headers, without which no kernel can be built.
fn check_toolkit() -> Result<(), Advised> {
    // SAFETY: loading the compiler library runs only its own initialisation.
    let compiler = COMPILERS
        .iter()
        .any(|name| unsafe { Library::new(*name) }.is_ok());
    let given = std::env::var_os("CUDA_PATH").map(|path| Path::new(&path).join("include"));
    let usual = [
        "/usr/local/cuda/include",
        "/opt/cuda/include",
        "/usr/include",
    ];
    let headers = given
        .into_iter()
        .chain(usual.map(Into::into))
        .any(|p| p.join("cuda_fp16.h").exists());
    let lacking = match (compiler, headers) {
        (true, true) => return Ok(()),
        (false, _) => "cuda: no run-time compiler (looked for libnvrtc.so)",
        (_, false) => "cuda: no headers (looked for cuda_fp16.h in $CUDA_PATH/include)",
    };
    Err(Advised::failed(
        lacking,
        "install the CUDA toolkit and set CUDA_PATH to it, or use another --device",
    ))
}

pub fn find(index: usize) -> anyhow::Result<Device> {
    let help =
        "install NVIDIA's driver, or use another --device; `trainer devices` lists what is here";
    let cards = list().map_err(|reason| Advised::failed(reason, help))?;
    if index >= cards.len() {
        let message = format!(
            "there is no cuda:{index}: the driver finds {} cards",
            cards.len()
        );
        return Err(Advised::failed(message, help).into());
    }
    check_toolkit()?;
    Ok(Device::Cuda(index))
}

pub fn best() -> Option<Device> {
    find(0).ok()
}
