//! Burn's wgpu backend with a clerk before the device, who writes down what passes: a CubeCL runtime
//! whose server hands everything on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::backend::Autodiff;
use burn::backend::wgpu::{WgpuDevice, WgpuRuntime};
use burn::prelude::Backend;
use burn_cubecl::CubeBackend;
use burn_fusion::Fusion;
use cubecl::bytes::Bytes;
use cubecl::client::ComputeClient;
use cubecl::device::{DeviceId, DeviceService, ServerUtilitiesHandle};
use cubecl::future::DynFut;
use cubecl::ir::TargetProperties;
use cubecl::prelude::*;
use cubecl::profile::ProfileDuration;
use cubecl::server::{
    Binding, ComputeServer, CopyDescriptor, KernelArguments, ProfileError, ProfilingToken,
    ServerCommunication, ServerError, ServerUtilities,
};
use cubecl::stream_id::StreamId;
use cubecl::wgpu::WgpuServer;
use cubecl::zspace::{Shape, Strides};
use cubecl::{MemoryAllocationMode, MemoryUsage};
use cubecl_runtime::allocator::ContiguousMemoryLayoutPolicy;
use cubecl_runtime::logging::ServerLogger;
use cubecl_runtime::memory_management::ManagedMemoryHandle;
use cubecl_runtime::storage::{ComputeStorage, ManagedResource};

/// The backend, composed as `burn::backend::Wgpu` is.
pub type B = Autodiff<Fusion<CubeBackend<Counted, f32, i32, u32>>>;

/// What has passed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Kernels.
    pub launches: usize,
    /// Shapes, strides and scalars of the kernels.
    pub argument_bytes: usize,
    /// Tensors from the host.
    pub uploads: usize,
    /// Their bytes.
    pub uploaded_bytes: usize,
    /// Tensors to the host; each waits for the device.
    pub reads: usize,
    /// Their bytes.
    pub read_bytes: usize,
    /// Bytes of all tensors that were made.
    pub allocated_bytes: usize,
    /// Most bytes that tensors held at a time.
    pub peak_bytes: usize,
}

static COUNTS: Mutex<Counts> = Mutex::new(Counts {
    launches: 0,
    argument_bytes: 0,
    uploads: 0,
    uploaded_bytes: 0,
    reads: 0,
    read_bytes: 0,
    allocated_bytes: 0,
    peak_bytes: 0,
});
/// One test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn counts() -> MutexGuard<'static, Counts> {
    COUNTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What passes while `run` runs for the second time, on what it returned of what was prepared: the
/// first one compiles and tunes kernels. All of it alone, as what other tests prepare would count.
pub fn count<T>(
    device: &WgpuDevice,
    prepare: impl FnOnce() -> T,
    mut run: impl FnMut(T) -> T,
) -> Counts {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut run = |state| {
        let state = run(state);
        B::sync(device).expect("the device answers");
        state
    };
    let state = run(prepare());
    *counts() = Counts::default();
    let state = run(state);
    let counted = *counts();
    drop(state);
    B::sync(device).expect("the device answers");
    counted
}

/// The wgpu runtime, counted.
#[derive(Debug, Clone)]
pub struct Counted;

impl Runtime for Counted {
    type Compiler = <WgpuRuntime as Runtime>::Compiler;
    type Server = Clerk;
    type Device = WgpuDevice;

    fn client(device: &WgpuDevice) -> ComputeClient<Self> {
        ComputeClient::load(device)
    }

    fn name(_: &ComputeClient<Self>) -> &'static str {
        "wgpu<wgsl>" // as the one that is counted, so that they share what was tuned
    }

    fn max_cube_count() -> (u32, u32, u32) {
        WgpuRuntime::max_cube_count()
    }

    fn can_read_tensor(shape: &Shape, strides: &Strides) -> bool {
        WgpuRuntime::can_read_tensor(shape, strides)
    }

    fn target_properties() -> TargetProperties {
        WgpuRuntime::target_properties()
    }

    fn enumerate_devices(
        type_id: u16,
        info: &<WgpuServer as ComputeServer>::Info,
    ) -> Vec<DeviceId> {
        WgpuRuntime::enumerate_devices(type_id, info)
    }
}

/// Counts, and hands on.
#[derive(Debug)]
pub struct Clerk {
    server: WgpuServer,
    utilities: Arc<ServerUtilities<Self>>,
    /// Bytes in use, by stream.
    held: HashMap<StreamId, u64>,
}

impl DeviceService for Clerk {
    fn init(device: DeviceId) -> Self {
        let server = WgpuServer::init(device);
        let theirs = ComputeServer::utilities(&server);
        let utilities = ServerUtilities::new(
            theirs.properties.clone(),
            theirs.logger.clone(),
            theirs.info,
            ContiguousMemoryLayoutPolicy::new(theirs.properties.memory.alignment as usize),
        );
        Self {
            server,
            utilities: Arc::new(utilities),
            held: HashMap::new(),
        }
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone()
    }
}

impl ServerCommunication for Clerk {
    const SERVER_COMM_ENABLED: bool = false;
}

impl ComputeServer for Clerk {
    type Kernel = <WgpuServer as ComputeServer>::Kernel;
    type Info = <WgpuServer as ComputeServer>::Info;
    type MemoryLayoutPolicy = ContiguousMemoryLayoutPolicy;
    type Storage = <WgpuServer as ComputeServer>::Storage;

    fn initialize_memory(&mut self, memory: ManagedMemoryHandle, size: u64, stream: StreamId) {
        self.server.initialize_memory(memory, size, stream);
        if let Ok(usage) = self.server.memory_usage(stream) {
            self.held.insert(stream, usage.bytes_in_use);
        }
        let held = self.held.values().sum::<u64>() as usize;
        let mut counts = counts();
        counts.allocated_bytes += size as usize;
        counts.peak_bytes = counts.peak_bytes.max(held);
    }

    fn write(&mut self, descriptors: Vec<(CopyDescriptor, Bytes)>, stream: StreamId) {
        let mut counts = counts();
        for (_, bytes) in &descriptors {
            counts.uploads += 1;
            counts.uploaded_bytes += bytes.len();
        }
        drop(counts);
        self.server.write(descriptors, stream);
    }

    fn read(
        &mut self,
        descriptors: Vec<CopyDescriptor>,
        stream: StreamId,
    ) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        let mut counts = counts();
        for descriptor in &descriptors {
            counts.reads += 1;
            counts.read_bytes += descriptor.shape.iter().product::<usize>() * descriptor.elem_size;
        }
        drop(counts);
        self.server.read(descriptors, stream)
    }

    unsafe fn launch(
        &mut self,
        kernel: Self::Kernel,
        count: CubeCount,
        arguments: KernelArguments,
        mode: ExecutionMode,
        stream: StreamId,
    ) {
        let mut counts = counts();
        counts.launches += 1;
        counts.argument_bytes += size_of_val(arguments.info.data.as_slice());
        drop(counts);
        // SAFETY: what the caller vouches for is handed on.
        unsafe { self.server.launch(kernel, count, arguments, mode, stream) };
    }

    fn logger(&self) -> Arc<ServerLogger> {
        self.server.logger()
    }

    fn utilities(&self) -> Arc<ServerUtilities<Self>> {
        self.utilities.clone()
    }

    fn sync(&mut self, stream: StreamId) -> DynFut<Result<(), ServerError>> {
        self.server.sync(stream)
    }

    fn get_resource(
        &mut self,
        binding: Binding,
        stream: StreamId,
    ) -> Result<ManagedResource<<Self::Storage as ComputeStorage>::Resource>, ServerError> {
        self.server.get_resource(binding, stream)
    }

    fn flush(&mut self, stream: StreamId) -> Result<(), ServerError> {
        self.server.flush(stream)
    }

    fn memory_usage(&mut self, stream: StreamId) -> Result<MemoryUsage, ServerError> {
        self.server.memory_usage(stream)
    }

    fn memory_cleanup(&mut self, stream: StreamId) {
        self.server.memory_cleanup(stream);
    }

    fn start_profile(&mut self, stream: StreamId) -> Result<ProfilingToken, ServerError> {
        self.server.start_profile(stream)
    }

    fn end_profile(
        &mut self,
        stream: StreamId,
        token: ProfilingToken,
    ) -> Result<ProfileDuration, ProfileError> {
        self.server.end_profile(stream, token)
    }

    fn allocation_mode(&mut self, mode: MemoryAllocationMode, stream: StreamId) {
        self.server.allocation_mode(mode, stream);
    }
}
