//! The `tidegate` command.

#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let config = match args.iter().position(|a| a == "--config") {
        Some(at) => tidegate::config::Config::load(std::path::Path::new(&args[at + 1])),
        None => Ok(tidegate::config::Config::builtin()),
    };
    let config = match config {
        Ok(config) => config,
        Err(e) => {
            eprintln!("{e}");
            return 64.into();
        }
    };
    let _ = tidegate::telemetry::log::init(&config.log.level, false);
    let runtime = tokio::runtime::Runtime::new().expect("threads can be started");
    match runtime.block_on(tidegate::runtime::run(config, 100_000)) {
        Ok(()) => 0.into(),
        Err(e) => {
            eprintln!("{e}");
            e.exit_code().into()
        }
    }
}
