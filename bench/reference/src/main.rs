//! What Element's crypto (matrix-sdk-crypto) takes for the work that the benchmarks of cryptohook measure.
//!
//! reference --work keys-1|keys-200|first|query|memory|stored [--store memory|sqlite-full|sqlite-normal]
//!           [--keys 2000] [--batch 100] [--stored 0]
//!
//! Prints a JSON object in a line for each figure: see bench/figures. A process does one work, so that its memory is its own.
mod crowd;
mod meter;
mod parties;
mod works;

use works::Options;

fn parse() -> (String, Options) {
    let mut options = Options { store: "sqlite-full".into(), keys: 2000, batch: 100, stored: 0 };
    let mut work = String::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().unwrap_or_else(|| panic!("{name} needs a value"));
        match name.as_str() {
            "--work" => work = value,
            "--store" => options.store = value,
            "--keys" => options.keys = value.parse().unwrap(),
            "--batch" => options.batch = value.parse().unwrap(),
            "--stored" => options.stored = value.parse().unwrap(),
            _ => panic!("there is no option {name}"),
        }
    }
    (work, options)
}

fn main() {
    let (work, options) = parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(works::run(&work, options));
    // The pool of connections wants a runtime while it is dropped.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
}
