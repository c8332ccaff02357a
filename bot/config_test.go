package bot

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"gopkg.in/yaml.v3"
	"maunium.net/go/mautrix/id"
)

// Whatever is wrong, this must never be seen in an error.
const secretPassword = "hunter2"

const masterKey = "nqOvzeuGWT/sRx3h7+MHoInYj3Uk2LD/unI9kDYcHwk"

// completeConfig names every key, so that it is not rewritten.
const completeConfig = `homeserver:
    address: "http://127.0.0.1:8008"
account:
    user_id: "@bot:localhost"
    password: hunter2
    access_token: ""
    device_id: ""
    recovery_key: ""
    reset_identity: false
database:
    type: sqlite3-fk-wal-fullsync
    uri: "file:data/bot.db?_txlock=immediate"
encryption:
    pickle_key: hunter2pickle
    wait: 25s
invites:
    allow: ["@*:localhost"]
annotate:
    mode: reply
    shields: lax
    language: en
    room_languages: {}
trust:
    requirement: untrusted
    operators: []
    verified_users: {}
limits:
    answers_per_sender: 60
    answers_per_room: 300
    edits_per_room: 10
    invites_per_sender: 100
    invites: 60
    queued_events: 20000
    waiting_per_sender: 100
    waiting_per_room: 500
    late_per_sender: 1000
    to_device_bytes: 65536
    searches_per_sender: 100
    searches_per_room: 500
metrics:
    listen: ""
logging:
    min_level: info
    writers: []
`

func exampleConfig(t testing.TB) string {
	t.Helper()
	example, err := os.ReadFile(filepath.Join(repository, "config.example.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	return string(example)
}

// repository is found before a test changes the folder.
var repository = func() string {
	path, err := filepath.Abs("..")
	if err != nil {
		panic(err)
	}
	return path
}()

// loadText writes text to config.yaml in a new current folder and loads it.
func loadText(t *testing.T, text string, options LoadOptions, environ ...string) (*Config, error) {
	t.Helper()
	t.Chdir(t.TempDir())
	writeText(t, "config.yaml", text)
	return load(t, options, environ...)
}

func load(t *testing.T, options LoadOptions, environ ...string) (*Config, error) {
	t.Helper()
	options.Example = exampleConfig(t)
	options.Environ = append([]string{"HOME=/"}, environ...)
	return Load("config.yaml", options)
}

func mustLoad(t *testing.T, text string, environ ...string) *Config {
	t.Helper()
	c, err := loadText(t, text, LoadOptions{}, environ...)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func writeText(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func readText(t testing.TB, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// replaced returns completeConfig with a part of it replaced.
func replaced(t *testing.T, part, by string) string {
	t.Helper()
	if strings.Count(completeConfig, part) != 1 {
		t.Fatalf("%q is not in the config exactly once", part)
	}
	return strings.Replace(completeConfig, part, by, 1)
}

func expectFaults(t *testing.T, err error, want ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want:\n%s", strings.Join(want, "\n"))
	}
	fault, ok := err.(*ConfigError)
	if !ok {
		t.Fatalf("%T is not a *ConfigError", err)
	}
	if got := err.Error(); got != strings.Join(want, "\n") {
		t.Errorf("got:\n%s\nwant:\n%s", got, strings.Join(want, "\n"))
	}
	for _, line := range fault.Faults {
		if strings.ContainsAny(line, "\n\r") {
			t.Errorf("fault is not one line: %q", line)
		}
	}
	if strings.Contains(err.Error(), secretPassword) {
		t.Errorf("the error shows a secret: %s", err)
	}
}

func TestConfigMistakeIsOneLineThatNamesKeyFaultAndRemedy(t *testing.T) {
	const badURL = "; write for example http://127.0.0.1:8008"
	const badID = " is not a full Matrix ID; write for example @bot:example.com"
	for name, test := range map[string]struct {
		part, by string // of completeConfig
		want     string
	}{
		"unknown section":         {"homeserver:", "home_server:\n    a: b\nhomeserver:", "config.yaml: line 1: home_server: is not a known key; did you mean homeserver?"},
		"unknown key":             {"    address:", "    adress: x\n    address:", "config.yaml: line 2: homeserver.adress: is not a known key; did you mean homeserver.address?"},
		"required key misspelled": {"address:", "adress:", "config.yaml: line 2: homeserver.adress: is not a known key; did you mean homeserver.address?"},
		"key in wrong section":    {"invites:\n", "invites:\n    pickle_key: x\n", "config.yaml: line 17: invites.pickle_key: is not a known key; did you mean encryption.pickle_key?"},
		"key without section":     {"invites:\n", "user_id: x\ninvites:\n", "config.yaml: line 16: user_id: is not a known key; did you mean account.user_id?"},
		"unknown logging key":     {"min_level: info", "min_lvel: info", "config.yaml: line 43: logging.min_lvel: is not a known key; did you mean logging.min_level?"},
		"unknown writer key":      {"writers: []", "writers: [{typ: stdout, type: stdout}]", "config.yaml: line 44: logging.writers.typ: is not a known key; did you mean logging.writers.type?"},
		"duplicate key":           {"    shields: lax", "    shields: lax\n    mode: reply", "config.yaml: line 21: annotate.mode: is there twice, first on line 19; remove one of the two"},
		"duplicate section":       {"logging:", "invites:\n    allow: []\nlogging:", "config.yaml: line 42: invites: is there twice, first on line 16; remove one of the two"},
		"duplicate pin":           {"verified_users: {}", `verified_users: {"@a:b": "` + masterKey + `", "@a:b": "` + masterKey + `"}`, "config.yaml: line 26: trust.verified_users: has an entry twice, first on line 26; remove one of the two"},

		"list for text":        {"password: hunter2\n", "password: [hunter2]\n", "config.yaml: line 5: account.password: is a list; write text"},
		"section for text":     {"password: hunter2\n", "password: {hunter2: 1}\n", "config.yaml: line 5: account.password: is a section with keys of its own; write text"},
		"text for bool":        {"reset_identity: false", "reset_identity: maybe", `config.yaml: line 9: account.reset_identity: "maybe" is neither true nor false; write one of the two`},
		"list for bool":        {"reset_identity: false", "reset_identity: []", "config.yaml: line 9: account.reset_identity: is a list; write true or false"},
		"text for list":        {`allow: ["@*:localhost"]`, `allow: "@*:localhost"`, "config.yaml: line 17: invites.allow: is a single value; write a list, for example [a, b]"},
		"section in list":      {`allow: ["@*:localhost"]`, `allow: [{a: b}]`, "config.yaml: line 17: invites.allow: is a section with keys of its own; write text"},
		"list for map":         {"verified_users: {}", "verified_users: []", `config.yaml: line 26: trust.verified_users: is a list; write lines of the form "key: value"`},
		"text for section":     {"annotate:\n    mode: reply\n    shields: lax\n    language: en\n    room_languages: {}\n", "annotate: reply\n", `config.yaml: line 18: annotate: is a single value; write lines of the form "key: value"`},
		"section for duration": {"wait: 25s", "wait: {a: 1}", "config.yaml: line 15: encryption.wait: is a section with keys of its own; write a time, for example 25s"},
		"number for duration":  {"wait: 25s", "wait: 25", `config.yaml: line 15: encryption.wait: "25" is not a time; write a number with its unit, for example 25s or 2m`},
		"list as key":          {"invites:\n", "invites:\n    [a, b]: x\n", `config.yaml: line 17: invites: has a key that is not a plain word; write lines of the form "key: value"`},
		"bad log level":        {"min_level: info", "min_level: loud", `config.yaml: line 43: logging.min_level: "loud" is not a level; write error, warn, info, debug or trace`},
		"text for number":      {"writers: []", "writers: [{type: file, max_size: big}]", `config.yaml: line 44: logging.writers.max_size: "big" is not a whole number; write for example 100`},
		"bad writer type":      {"writers: []", "writers: [{type: printer}]", `config.yaml: logging.writers: "printer" is not one of the choices; write stdout, stderr, file, syslog, syslog-cee or journald`},
		"bad writer format":    {"writers: []", "writers: [{type: stdout, format: xml}]", `config.yaml: logging.writers: "xml" is not one of the choices; write json, pretty or pretty-colored`},

		"no address":         {`"http://127.0.0.1:8008"`, `""`, "config.yaml: homeserver.address: is missing" + badURL},
		"ftp":                {`"http://127.0.0.1:8008"`, `ftp://x`, `config.yaml: homeserver.address: "ftp://x" is not an http or https URL` + badURL},
		"no scheme":          {`"http://127.0.0.1:8008"`, `example.com`, `config.yaml: homeserver.address: "example.com" is not an http or https URL` + badURL},
		"not a URL":          {`"http://127.0.0.1:8008"`, `"http://exa mple"`, `config.yaml: homeserver.address: "http://exa mple" is not an http or https URL` + badURL},
		"no host":            {`"http://127.0.0.1:8008"`, `"https:///path"`, `config.yaml: homeserver.address: "https:///path" names no server that can be reached` + badURL},
		"no port":            {`"http://127.0.0.1:8008"`, `"https://x:"`, `config.yaml: homeserver.address: "https://x:" names no server that can be reached` + badURL},
		"port out of range":  {`"http://127.0.0.1:8008"`, `"https://x:65536"`, `config.yaml: homeserver.address: "https://x:65536" names no server that can be reached` + badURL},
		"query":              {`"http://127.0.0.1:8008"`, `"https://x/?a=b"`, `config.yaml: homeserver.address: "https://x/?a=b" has a part after ? or #` + badURL},
		"password in URL":    {`"http://127.0.0.1:8008"`, `"https://bot:hunter2@x"`, `config.yaml: homeserver.address: contains a user name or password` + badURL},
		"very long value":    {`"http://127.0.0.1:8008"`, strings.Repeat("x", 1000), `config.yaml: homeserver.address: "` + strings.Repeat("x", 80) + `…" is not an http or https URL` + badURL},
		"control characters": {`"http://127.0.0.1:8008"`, `"a\nb"`, `config.yaml: homeserver.address: "a\nb" is not an http or https URL` + badURL},

		"no user ID":             {`"@bot:localhost"`, `""`, "config.yaml: account.user_id: is missing; write a full Matrix ID, for example @bot:example.com"},
		"local part only":        {`"@bot:localhost"`, `bot`, `config.yaml: account.user_id: "bot"` + badID},
		"no server":              {`"@bot:localhost"`, `"@bot"`, `config.yaml: account.user_id: "@bot"` + badID},
		"bad server":             {`"@bot:localhost"`, `"@bot:local host"`, `config.yaml: account.user_id: "@bot:local host"` + badID},
		"empty local part":       {`"@bot:localhost"`, `"@:localhost"`, `config.yaml: account.user_id: "@:localhost"` + badID},
		"user ID with space":     {`"@bot:localhost"`, `"@b t:localhost"`, `config.yaml: account.user_id: "@b t:localhost"` + badID},
		"no password, no token":  {"password: hunter2\n", "password:\n", "config.yaml: account.password: is missing, and account.access_token too; write one of the two"},
		"password null":          {"password: hunter2\n", "password: ~\n", "config.yaml: account.password: is missing, and account.access_token too; write one of the two"},
		"passphrase as recovery": {`recovery_key: ""`, `recovery_key: hunter2 is my phrase`, `config.yaml: account.recovery_key: is not a recovery key; write the 48 letters and digits, in groups of four, that begin with "Es" (a passphrase does not do), or generate, or ""`},

		"file for a server":     {"sqlite3-fk-wal-fullsync", "postgres", "config.yaml: database.uri: is not the URI of a PostgreSQL database; write for example postgres://sendertrust:password@localhost/sendertrust"},
		"unknown database":      {"sqlite3-fk-wal-fullsync", "mysql", `config.yaml: database.type: "mysql" is not one of the choices; write sqlite3-fk-wal-fullsync, sqlite3-fk-wal or postgres`},
		"no database file":      {`"file:data/bot.db?_txlock=immediate"`, `""`, "config.yaml: database.uri: names no file; write for example file:data/sendertrust.db?_txlock=immediate"},
		"URI of a server":       {`"file:data/bot.db?_txlock=immediate"`, `postgres://bot:hunter2@x/y`, "config.yaml: database.uri: names no file; write for example file:data/sendertrust.db?_txlock=immediate"},
		"bad escape":            {`"file:data/bot.db?_txlock=immediate"`, `"file:data/%zz"`, "config.yaml: database.uri: is not an SQLite URI; write for example file:data/sendertrust.db?_txlock=immediate"},
		"two folders missing":   {"file:data/bot.db", "file:a/b/bot.db", `config.yaml: database.uri: the folder "a/b" is missing and cannot be made: no such file or directory; make it yourself, or name another`},
		"folder is a file":      {"file:data/bot.db", "file:config.yaml/bot.db", `config.yaml: database.uri: the folder "config.yaml" cannot be written: not a directory; give the bot's user the right to write there, or name another`},
		"folder cannot be used": {"file:data/bot.db", "file:/proc/bot.db", `config.yaml: database.uri: the folder "/proc" cannot be written: no such file or directory; give the bot's user the right to write there, or name another`},
		"file is a folder":      {"file:data/bot.db", "file:.", `config.yaml: database.uri: "." cannot be written: is a directory; give the bot's user the right to write it, or name another file`},

		"no pickle key":  {"pickle_key: hunter2pickle", `pickle_key: ""`, "config.yaml: encryption.pickle_key: is empty; write generate, and the program makes a key"},
		"wait too long":  {"wait: 25s", "wait: 10m1s", `config.yaml: encryption.wait: "10m1s" is out of range; write a time from 0s to 10m, for example 25s`},
		"wait too short": {"wait: 25s", "wait: -1s", `config.yaml: encryption.wait: "-1s" is out of range; write a time from 0s to 10m, for example 25s`},

		"glob without ID":     {`"@*:localhost"`, `localhost`, `config.yaml: invites.allow: "localhost" can never match a Matrix ID; write for example "@*:example.com"`},
		"glob without server": {`"@*:localhost"`, `"@bob"`, `config.yaml: invites.allow: "@bob" can never match a Matrix ID; write for example "@*:example.com"`},
		"glob too large":      {`"@*:localhost"`, `"@` + strings.Repeat("?", 1001) + `"`, `config.yaml: invites.allow: "@` + strings.Repeat("?", 79) + `…" is not a pattern; write for example "@*:example.com"`},

		"unknown mode":         {"mode: reply", "mode: shout", `config.yaml: annotate.mode: "shout" is not one of the choices; write reply, warnings, reaction or command`},
		"unknown shields":      {"shields: lax", "shields: medium", `config.yaml: annotate.shields: "medium" is not one of the choices; write lax or strict`},
		"unknown language":     {"language: en", "language: English", `config.yaml: annotate.language: "English" is not one of the choices; write en or de`},
		"no language":          {"language: en", "language: ", `config.yaml: annotate.language: "" is not one of the choices; write en or de`},
		"room's language":      {"room_languages: {}", `room_languages: {"!room:example.com": fr}`, `config.yaml: annotate.room_languages: "fr" is not one of the languages; write en or de`},
		"no room's language":   {"room_languages: {}", `room_languages: {"!room:example.com": }`, `config.yaml: annotate.room_languages: "" is not one of the languages; write en or de`},
		"language of an alias": {"room_languages: {}", `room_languages: {"#room:example.com": de}`, `config.yaml: annotate.room_languages: "#room:example.com" is not the ID of a room; write for example !abcdefg:example.com, as the room's settings show it`},
		"language of no room":  {"room_languages: {}", `room_languages: {"!:example.com": de}`, `config.yaml: annotate.room_languages: "!:example.com" is not the ID of a room; write for example !abcdefg:example.com, as the room's settings show it`},
		"room with a space":    {"room_languages: {}", `room_languages: {"! a": de}`, `config.yaml: annotate.room_languages: "! a" is not the ID of a room; write for example !abcdefg:example.com, as the room's settings show it`},
		"list of languages":    {"room_languages: {}", `room_languages: [de]`, `config.yaml: line 22: annotate.room_languages: is a list; write lines of the form "key: value"`},
		"unknown requirement":  {"requirement: untrusted", "requirement: trusted", `config.yaml: trust.requirement: "trusted" is not one of the choices; write untrusted, cross_signed_or_legacy or cross_signed`},
		"bad operator":         {"operators: []", "operators: [alice]", `config.yaml: trust.operators: "alice"` + badID},
		"bad pin's user":       {"verified_users: {}", "verified_users: {alice: " + masterKey + "}", `config.yaml: trust.verified_users: "alice"` + badID},
		"pin not base64":       {"verified_users: {}", `verified_users: {"@a:b": "not-a-key"}`, `config.yaml: trust.verified_users: the key of "@a:b" is not base64; write the user's master key: 43 letters, digits, + and /`},
		"pin too short":        {"verified_users: {}", `verified_users: {"@a:b": "AAAA"}`, `config.yaml: trust.verified_users: the key of "@a:b" has 3 bytes instead of 32; write the user's master key: 43 letters, digits, + and /`},
		"pin with stray bits":  {"verified_users: {}", `verified_users: {"@a:b": "nqOvzeuGWT/sRx3h7+MHoInYj3Uk2LD/unI9kDYcHwl"}`, `config.yaml: trust.verified_users: the key of "@a:b" is not base64; write the user's master key: 43 letters, digits, + and /`},
		"metrics without port": {`listen: ""`, `listen: "127.0.0.1"`, `config.yaml: metrics.listen: "127.0.0.1" is not an address with a port; write for example 127.0.0.1:9100, or ""`},
		"metrics as URL":       {`listen: ""`, `listen: "http://127.0.0.1:9100"`, `config.yaml: metrics.listen: "http://127.0.0.1:9100" is not an address with a port; write for example 127.0.0.1:9100, or ""`},
		"metrics port too big": {`listen: ""`, `listen: ":65536"`, `config.yaml: metrics.listen: ":65536" is not an address with a port; write for example 127.0.0.1:9100, or ""`},
		"limit of nothing":     {"answers_per_sender: 60", "answers_per_sender: 0", "config.yaml: limits.answers_per_sender: 0 is out of range; write a number from 1 to 1000000"},
		"limit beyond measure": {"late_per_sender: 1000", "late_per_sender: 1000001", "config.yaml: limits.late_per_sender: 1000001 is out of range; write a number from 1 to 1000000"},
		"no room for a key":    {"to_device_bytes: 65536", "to_device_bytes: 100", "config.yaml: limits.to_device_bytes: 100 is out of range; write a number from 8192 to 1048576"},
		"limit without number": {"edits_per_room: 10", "edits_per_room: many", `config.yaml: line 30: limits.edits_per_room: "many" is not a whole number; write for example 100`},

		"alias":            {"password: hunter2\n", "password: *hunter2\n", "config.yaml: is not YAML: a value begins with * or &; put it in quotes"},
		"anchor":           {"password: hunter2\n", "password: &hunter2 x\n", "config.yaml: line 5: account.password: begins with *, & or !, which has a meaning of its own in YAML; put the value in quotes"},
		"tag":              {"password: hunter2\n", "password: !hunter2\n", "config.yaml: line 5: account.password: begins with *, & or !, which has a meaning of its own in YAML; put the value in quotes"},
		"ID without quote": {`"@bot:localhost"`, `@bot:localhost`, "config.yaml: is not YAML: line 4: found character that cannot start any token; put values that begin with @, % or a backquote in quotes, and indent with spaces"},
		"no colon":         {"    wait: 25s", "    wait 25s", "config.yaml: is not YAML: line 15: could not find expected ':'; check the quotes, the colons and the spaces before the keys in and above that line"},
		"two documents":    {"trust:\n", "---\ntrust:\n", "config.yaml: has two YAML documents; remove the line --- between them, or one of the two"},
	} {
		t.Run(name, func(t *testing.T) {
			text := replaced(t, test.part, test.by)
			_, err := loadText(t, text, LoadOptions{})
			expectFaults(t, err, test.want)
			if readText(t, "config.yaml") != text {
				t.Error("a faulty file was rewritten")
			}
		})
	}
}

func TestConfigFileMistakes(t *testing.T) {
	for name, test := range map[string]struct{ text, want string }{
		"empty":         {"", "config.yaml: is empty; fill it with the example, which sendertrust -e writes"},
		"only comments": {"# nothing\n", "config.yaml: is empty; fill it with the example, which sendertrust -e writes"},
		"only null":     {"---\n~\n", "config.yaml: is empty; fill it with the example, which sendertrust -e writes"},
		"a list":        {"- a\n", `config.yaml: line 1: is a list; write lines of the form "key: value"`},
		"too large":     {strings.Repeat("#", 1<<20+1), "config.yaml: cannot be read: it is larger than 1 MiB"},
		"binary":        {"\x00\x01", "config.yaml: is not YAML: control characters are not allowed; check the quotes, the colons and the spaces before the keys in and above that line"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := loadText(t, test.text, LoadOptions{})
			expectFaults(t, err, test.want)
		})
	}
	t.Run("missing", func(t *testing.T) {
		t.Chdir(t.TempDir())
		_, err := load(t, LoadOptions{})
		expectFaults(t, err, "config.yaml: is not there; make it with: sendertrust -e -c config.yaml")
	})
	t.Run("folder", func(t *testing.T) {
		t.Chdir(t.TempDir())
		if err := os.Mkdir("config.yaml", 0o700); err != nil {
			t.Fatal(err)
		}
		_, err := load(t, LoadOptions{})
		expectFaults(t, err, "config.yaml: cannot be read: is a directory")
	})
}

func TestAllConfigMistakesAreToldAtOnce(t *testing.T) {
	_, err := loadText(t, "homeserver: {adress: x}\naccount: 5\nannotate: {mode: a, shields: b}\n", LoadOptions{}, "SENDERTRUST_X=y")
	expectFaults(t, err,
		"config.yaml: line 1: homeserver.adress: is not a known key; did you mean homeserver.address?",
		`config.yaml: line 2: account: is a single value; write lines of the form "key: value"`,
		"SENDERTRUST_X: is not a known variable; did you mean SENDERTRUST_DATABASE__URI?",
		`config.yaml: annotate.mode: "a" is not one of the choices; write reply, warnings, reaction or command`,
		`config.yaml: annotate.shields: "b" is not one of the choices; write lax or strict`,
	)
	if _, err = os.Stat("data"); !os.IsNotExist(err) {
		t.Error("a faulty config made the database's folder")
	}
}

func TestConfigErrorNeverShowsASecret(t *testing.T) {
	for _, account := range []string{
		`account: {user_id: "@a:b", password: one,hunter2}`,
		`account: {user_id: "@a:b", password: one,hunter2,hunter2}`,
		`account: {user_id: "@a:b", password hunter2}`,
		"account: hunter2",
		"account:\n    hunter2",
		"account:\n    password hunter2: x",
		"account:\n    password: hunter2: x",
		"account:\n    password: \"hunter2",
		"account:\n    password: 'hunter2",
		"account:\n    password: %hunter2",
		"account:\n    password: @hunter2",
		"account:\n    password: `hunter2`",
		"account:\n    password: |hunter2",
		"account:\n    password: !!int hunter2",
		"account:\n    password: !<hunter2",
		"account:\n    password: \"\\hunter2\"",
		"account:\n    *hunter2 : x",
		"account:\n    ? [hunter2]\n    : x",
		"account:\n    recovery_key: hunter2",
		"*hunter2",
		"hunter2",
	} {
		_, err := loadText(t, account+"\n", LoadOptions{}, "SENDERTRUST_ACCOUNT__ACCESS_TOKEN_FILE=hunter2")
		if err == nil {
			t.Errorf("no error for %q", account)
		} else if strings.Contains(err.Error(), secretPassword) {
			t.Errorf("%q: the error shows the secret: %v", account, err)
		}
	}
}

func TestExampleConfigLoadsAndShowsTheDefaults(t *testing.T) {
	text := strings.Replace(exampleConfig(t), `password: ""`, "password: hunter2", 1)
	c := mustLoad(t, text)
	if c.Homeserver.Address == "" || c.Account.UserID == "" {
		t.Error("the example shows no address or no user ID")
	}
	want := defaultConfig()
	want.Homeserver, want.Account.UserID, want.Account.Password = c.Homeserver, c.Account.UserID, c.Account.Password
	if got, want := toYAML(t, c), toYAML(t, want); got != want {
		t.Errorf("the example differs from the defaults:\n%s\nwant:\n%s", got, want)
	}
	changed := strings.Replace(text, "pickle_key: generate", `pickle_key: "`+c.Encryption.PickleKey.Reveal()+`"`, 1)
	if got := readText(t, "config.yaml"); got != changed {
		t.Errorf("more than the pickle key was changed:\n%s", got)
	}
}

func toYAML(t *testing.T, value any) string {
	t.Helper()
	text, err := yaml.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestExampleConfigExplainsEveryKeyAndNoOther(t *testing.T) {
	var explained, known []string
	for _, section := range splitExample(exampleConfig(t)) {
		if !strings.HasPrefix(section.header, "#") {
			t.Errorf("%s is not explained", section.name)
		}
		for _, key := range section.keys {
			explained = append(explained, section.name+"."+key.name)
			if !strings.HasPrefix(key.text, "#") {
				t.Errorf("%s.%s is not explained", section.name, key.name)
			}
		}
	}
	zeroconfigOnly := []string{"logging.caller", "logging.metadata", "logging.timestamp"} // explained where the example links to
	for key := range configKeys(reflect.TypeFor[Config](), "", false) {
		if !slices.Contains(zeroconfigOnly, key) {
			known = append(known, key)
		}
	}
	slices.Sort(explained)
	slices.Sort(known)
	if !slices.Equal(explained, known) {
		t.Errorf("the example explains\n%v\nthe program knows\n%v", explained, known)
	}
}

func TestMissingOptionalKeysHaveTheirDefaults(t *testing.T) {
	c := mustLoad(t, "homeserver: {address: \"http://x\"}\naccount: {user_id: \"@a:b\", access_token: t}\nencryption: {pickle_key: p}\n")
	if c.Annotate.Language != "en" || len(c.Annotate.RoomLanguages) > 0 {
		t.Errorf("wrong defaults: %+v", c.Annotate)
	}
	if c.Encryption.Wait != 25*time.Second || c.Annotate.Mode != ModeReply || c.Annotate.Shields != ShieldsLax ||
		c.Trust.Requirement != "untrusted" || c.Database.Type != "sqlite3-fk-wal-fullsync" || len(c.Invites.Allow) > 0 {
		t.Errorf("wrong defaults: %+v", c)
	}
}

func TestValuesOfAllTypesAreRead(t *testing.T) {
	spaced := "nqOv zeuG WT/s Rx3h 7+MH oInY j3Uk 2LD/ unI9 kDYc Hwk="
	text := strings.NewReplacer(
		"reset_identity: false", "reset_identity: true",
		"password: hunter2", "password: 012",
		"wait: 25s", "wait: 2m",
		"operators: []", `operators: ["@a:b", "@c:d"]`,
		"verified_users: {}", `verified_users: {"@a:b": "`+spaced+`"}`,
		"language: en", "language: de",
		"room_languages: {}", `room_languages: {"!room:example.com": en, "!0pWcKQg-newer": de}`,
		"writers: []", "writers: [{type: file, format: json, filename: x.log, max_size: 5, compress: true, min_level: warn}]\n    metadata: {a: [1, 2]}\n    timestamp: false",
	).Replace(completeConfig)
	c := mustLoad(t, text)
	if !c.Account.ResetIdentity || c.Account.Password != "012" || c.Encryption.Wait != 2*time.Minute {
		t.Errorf("wrong values: %+v, password %q", c, c.Account.Password.Reveal())
	}
	if !slices.Equal(c.Trust.Operators, []id.UserID{"@a:b", "@c:d"}) || c.Trust.VerifiedUsers["@a:b"] != masterKey {
		t.Errorf("wrong values: %+v", c.Trust)
	}
	if rooms := c.Annotate.RoomLanguages; c.Annotate.Language != "de" || len(rooms) != 2 || rooms["!room:example.com"] != "en" || rooms["!0pWcKQg-newer"] != "de" {
		t.Errorf("wrong values: %+v", c.Annotate)
	}
	writer := c.Logging.Writers[0]
	if writer.MaxSize != 5 || !writer.Compress || writer.MinLevel.String() != "warn" || writer.Filename != "x.log" ||
		*c.Logging.Timestamp || c.Logging.Metadata["a"] == nil {
		t.Errorf("wrong values: %+v", c.Logging)
	}
	if readText(t, "config.yaml") != text {
		t.Error("a complete file was rewritten")
	}
}

func TestEnvironmentOverridesTheFile(t *testing.T) {
	secretFile := filepath.Join(t.TempDir(), "token")
	writeText(t, secretFile, "from the file\n")
	text := replaced(t, "pickle_key: hunter2pickle\n", "pickle_key: generate\n")
	c := mustLoad(t, text,
		"SENDERTRUST_HOMESERVER__ADDRESS=https://other",
		"SENDERTRUST_ACCOUNT__PASSWORD=*a: b #=c\\",
		"SENDERTRUST_ACCOUNT__ACCESS_TOKEN_FILE="+secretFile,
		"SENDERTRUST_ACCOUNT__RESET_IDENTITY=true",
		"SENDERTRUST_ENCRYPTION__PICKLE_KEY=pickled elsewhere",
		"SENDERTRUST_ENCRYPTION__WAIT=1m",
		"SENDERTRUST_INVITES__ALLOW=@a:b, @*:c",
		`SENDERTRUST_TRUST__OPERATORS=["@o:b", "@p:b"]`,
		`SENDERTRUST_TRUST__VERIFIED_USERS={"@v:b": "`+masterKey+`"}`,
		"SENDERTRUST_ANNOTATE__LANGUAGE=de",
		`SENDERTRUST_ANNOTATE__ROOM_LANGUAGES={"!room:example.com": en}`,
		"SENDERTRUST_LOGGING__MIN_LEVEL=warn",
		"SENDERTRUST_LOGGING__WRITERS=[{type: stderr}]",
	)
	if c.Homeserver.Address != "https://other" || c.Account.Password.Reveal() != `*a: b #=c\` ||
		c.Account.AccessToken.Reveal() != "from the file" || !c.Account.ResetIdentity ||
		c.Encryption.PickleKey.Reveal() != "pickled elsewhere" || c.Encryption.Wait != time.Minute {
		t.Errorf("wrong values: %+v", c)
	}
	if !slices.Equal(c.Invites.Allow, []string{"@a:b", "@*:c"}) || !slices.Equal(c.Trust.Operators, []id.UserID{"@o:b", "@p:b"}) ||
		len(c.Trust.VerifiedUsers) != 1 || c.Logging.MinLevel.String() != "warn" || c.Logging.Writers[0].Type != "stderr" {
		t.Errorf("wrong values: %+v", c)
	}
	if c.Annotate.Language != "de" || len(c.Annotate.RoomLanguages) != 1 || c.Annotate.RoomLanguages["!room:example.com"] != "en" {
		t.Errorf("wrong values: %+v", c.Annotate)
	}
	if readText(t, "config.yaml") != text {
		t.Error("the file was changed although the environment gives the secret")
	}
}

func TestEmptyListInTheEnvironmentEmptiesTheList(t *testing.T) {
	if c := mustLoad(t, completeConfig, "SENDERTRUST_INVITES__ALLOW="); len(c.Invites.Allow) != 0 {
		t.Errorf("the list is %v", c.Invites.Allow)
	}
}

func TestEnvironmentMistakes(t *testing.T) {
	for name, test := range map[string]struct {
		environ []string
		want    string
	}{
		"unknown":       {[]string{"SENDERTRUST_HOMESERVER_ADDRESS=x"}, "SENDERTRUST_HOMESERVER_ADDRESS: is not a known variable; did you mean SENDERTRUST_HOMESERVER__ADDRESS?"},
		"unknown file":  {[]string{"SENDERTRUST_ACCOUNT__PASSWROD_FILE=x"}, "SENDERTRUST_ACCOUNT__PASSWROD_FILE: is not a known variable; did you mean SENDERTRUST_ACCOUNT__PASSWORD?"},
		"both":          {[]string{"SENDERTRUST_ACCOUNT__PASSWORD_FILE=/x", "SENDERTRUST_ACCOUNT__PASSWORD=hunter2"}, "SENDERTRUST_ACCOUNT__PASSWORD_FILE: account.password: is set by SENDERTRUST_ACCOUNT__PASSWORD too; keep one of the two"},
		"no file":       {[]string{"SENDERTRUST_ACCOUNT__PASSWORD_FILE=hunter2"}, "SENDERTRUST_ACCOUNT__PASSWORD_FILE: account.password: the file cannot be read: no such file or directory; name a file that the bot's user may read"},
		"bool":          {[]string{"SENDERTRUST_ACCOUNT__RESET_IDENTITY=1"}, `SENDERTRUST_ACCOUNT__RESET_IDENTITY: account.reset_identity: "1" is neither true nor false; write one of the two`},
		"duration":      {[]string{"SENDERTRUST_ENCRYPTION__WAIT="}, `SENDERTRUST_ENCRYPTION__WAIT: encryption.wait: "" is not a time; write a number with its unit, for example 25s or 2m`},
		"list":          {[]string{"SENDERTRUST_INVITES__ALLOW=[@a:b]"}, "SENDERTRUST_INVITES__ALLOW: invites.allow: is not YAML: found character that cannot start any token; put values that begin with @, % or a backquote in quotes, and indent with spaces"},
		"map":           {[]string{"SENDERTRUST_TRUST__VERIFIED_USERS=@a:b"}, "SENDERTRUST_TRUST__VERIFIED_USERS: trust.verified_users: is not YAML: found character that cannot start any token; put values that begin with @, % or a backquote in quotes, and indent with spaces"},
		"checked value": {[]string{"SENDERTRUST_ACCOUNT__USER_ID=bot"}, `SENDERTRUST_ACCOUNT__USER_ID: account.user_id: "bot" is not a full Matrix ID; write for example @bot:example.com`},
		"generate":      {[]string{"SENDERTRUST_ENCRYPTION__PICKLE_KEY=generate"}, `SENDERTRUST_ENCRYPTION__PICKLE_KEY: encryption.pickle_key: "generate" works in the config file only, where the key can be kept; give the key itself`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := loadText(t, completeConfig, LoadOptions{}, test.environ...)
			expectFaults(t, err, test.want)
		})
	}
}

func TestGeneratedPickleKeyIsWrittenBack(t *testing.T) {
	for name, test := range map[string]struct{ part, by string }{
		"plain":         {"pickle_key: hunter2pickle", "pickle_key:   generate # made by the program"},
		"double quotes": {"pickle_key: hunter2pickle", `pickle_key: "generate"`},
		"single quotes": {"pickle_key: hunter2pickle", `pickle_key: 'generate'`},
		"next line":     {"pickle_key: hunter2pickle", "pickle_key:\n        generate"},
		"flow":          {"\n    pickle_key: hunter2pickle\n    wait: 25s", " { wait: 25s, pickle_key: generate }"},
		"missing":       {"    pickle_key: hunter2pickle\n", ""},
		"empty flow":    {"\n    pickle_key: hunter2pickle\n    wait: 25s", " {}"},
		"other flow":    {"\n    pickle_key: hunter2pickle\n    wait: 25s", " {wait: 25s}"},
		"no value":      {"\n    pickle_key: hunter2pickle\n    wait: 25s", " # none"},
		"no section":    {"encryption:\n    pickle_key: hunter2pickle\n    wait: 25s\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			c := mustLoad(t, "# Mein Bot: für uns\n"+replaced(t, test.part, test.by))
			key := c.Encryption.PickleKey.Reveal()
			if len(key) != 64 || strings.Trim(key, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz") != "" {
				t.Errorf("the key %q is not 64 letters and digits", key)
			}
			written := readText(t, "config.yaml")
			if strings.Count(written, key) != 1 || !strings.HasPrefix(written, "# Mein Bot: für uns\nhomeserver:") ||
				strings.Contains(test.by, "made by") && !strings.Contains(written, `pickle_key:   "`+key+`" # made by the program`) {
				t.Errorf("wrong file:\n%s", written)
			}
			info, err := os.Stat("config.yaml")
			if err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("mode %v, %v", info.Mode(), err)
			}
			expectSameAgain(t, c)
		})
	}
}

// expectSameAgain loads config.yaml a second time: the settings are the same, and the file is not touched.
func expectSameAgain(t *testing.T, first *Config) {
	t.Helper()
	before, err := os.Stat("config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	second, err := load(t, LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	after, err := os.Stat("config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if !os.SameFile(before, after) || !before.ModTime().Equal(after.ModTime()) {
		t.Error("the file was written again")
	}
	if second.Encryption.PickleKey != first.Encryption.PickleKey || toYAML(t, first) != toYAML(t, second) {
		t.Errorf("the settings changed:\n%s\n%s", toYAML(t, first), toYAML(t, second))
	}
}

func TestPickleKeyThatCannotBeWrittenIsAnError(t *testing.T) {
	text := replaced(t, "\n    pickle_key: hunter2pickle\n    wait: 25s", " ~")
	_, err := loadText(t, text, LoadOptions{})
	expectFaults(t, err, `config.yaml: encryption.pickle_key: cannot be written to this file; add the key to the section "encryption" yourself, with a long random value`)
	if readText(t, "config.yaml") != text {
		t.Error("the file was changed")
	}
}

func TestReadOnlyConfigIsNotWrittenAndGenerateIsAnError(t *testing.T) {
	text := "homeserver: {address: \"http://x\"}\naccount: {user_id: \"@a:b\", password: hunter2, recovery_key: generate}\n"
	_, err := loadText(t, text, LoadOptions{ReadOnly: true})
	expectFaults(t, err,
		`config.yaml: account.recovery_key: "generate" would be lost, because -n forbids to write the file; write the secret itself, or start once without -n`,
		`config.yaml: encryption.pickle_key: "generate" would be lost, because -n forbids to write the file; write the secret itself, or start once without -n`)
	if readText(t, "config.yaml") != text {
		t.Error("the file was changed")
	}
	text = strings.Replace(text, "recovery_key: generate", `recovery_key: ""`, 1)
	if _, err = loadText(t, text, LoadOptions{ReadOnly: true}, "SENDERTRUST_ENCRYPTION__PICKLE_KEY=p"); err != nil {
		t.Error(err)
	}
	if readText(t, "config.yaml") != text {
		t.Error("the file was changed")
	}
}

func TestMissingKeysAreAddedAndAllElseStays(t *testing.T) {
	const before = `# our bot
homeserver:   {address: 'http://127.0.0.1:8008'}   # flow style stays

account:      # who it is
  # its name
  user_id: "@bot:localhost"

  password: 'hunter2'
  reset_identity: False
database: {type: sqlite3-fk-wal}
encryption:
        # never change
        pickle_key: "p\u00e4"
trust:
# last line, without end`
	mustLoad(t, before, "SENDERTRUST_ACCOUNT__ACCESS_TOKEN=not for the file")
	after := readText(t, "config.yaml")

	var kept []string
	original := strings.Split(before, "\n")
	for _, line := range strings.Split(after, "\n") {
		if len(kept) < len(original) && line == original[len(kept)] {
			kept = append(kept, line)
		}
	}
	if len(kept) != len(original) {
		t.Errorf("line %q is gone from:\n%s", original[len(kept)], after)
	}
	for _, added := range []string{
		"account:      # who it is\n  # The device (the entry",
		"\n  device_id: \"\"\n",
		"\n  recovery_key: \"\"\n  # its name\n",
		"encryption:\n        # A message sometimes arrives",
		"\n        wait: 25s\n        # never change\n",
		"\ntrust:\n    # What a sender must have proven",
		"\n\n# Who may bring the bot into a room.\ninvites:\n    # (4)",
		"\n    allow: []\n\n# What the bot says about messages.\nannotate:\n",
		"\nlogging:\n",
	} {
		if !strings.Contains(after, added) {
			t.Errorf("%q is not in:\n%s", added, after)
		}
	}
	for _, absent := range []string{"access_token:", "not for the file", "@sendertrust:example.com", "fullsync"} {
		if strings.Contains(after, absent) {
			t.Errorf("%q is in:\n%s", absent, after)
		}
	}
	if again, err := load(t, LoadOptions{}, "SENDERTRUST_ACCOUNT__ACCESS_TOKEN=x"); err != nil || again.Encryption.PickleKey != "pä" {
		t.Errorf("the upgraded file does not load: %v", err)
	}
	if readText(t, "config.yaml") != after {
		t.Error("the file was changed again")
	}
}

func TestKeysAreNotAddedWhereThatWouldChangeAValue(t *testing.T) {
	const text = `homeserver: {address: "http://x"}
encryption: {pickle_key: p}
account:
    user_id: "@a:b"
    access_token: t
    device_id: ""
    recovery_key: ""
    reset_identity: false
    password: |+
        every line counts


`
	c := mustLoad(t, text)
	if after := readText(t, "config.yaml"); after != text || c.Account.Password != "every line counts\n\n\n" {
		t.Errorf("the password is now %q in:\n%s", c.Account.Password.Reveal(), after)
	}
}

func TestLineEndingsOfTheFileAreKept(t *testing.T) {
	text := strings.ReplaceAll(replaced(t, "    wait: 25s\ninvites:\n    allow: [\"@*:localhost\"]\n", ""), "\n", "\r\n")
	c := mustLoad(t, text)
	after := readText(t, "config.yaml")
	if strings.Count(after, "\n") != strings.Count(after, "\r\n") || !strings.Contains(after, "\r\n    wait: 25s\r\n") {
		t.Errorf("wrong line endings:\n%q", after)
	}
	expectSameAgain(t, c)
}

func TestJSONConfigKeepsItsForm(t *testing.T) {
	const text = `{"homeserver": {"address": "http://x"}, "account": {"user_id": "@a:b", "password": "hunter2"}}`
	c := mustLoad(t, text)
	want := strings.Replace(text, "{", `{encryption: {pickle_key: "`+c.Encryption.PickleKey.Reveal()+`"}, `, 1)
	if after := readText(t, "config.yaml"); after != want {
		t.Errorf("got %s, want %s", after, want)
	}
	expectSameAgain(t, c)
}

func TestKeyIsWrittenAfterLettersOfSeveralBytes(t *testing.T) {
	const text = `{"account": {"user_id": "@a:b", "password": "pä→ß"}, "homeserver": {"address": "http://x"}, "encryption": {"pickle_key": "generate"}}`
	c := mustLoad(t, text)
	want := strings.Replace(text, "generate", c.Encryption.PickleKey.Reveal(), 1)
	if after := readText(t, "config.yaml"); after != want {
		t.Errorf("got %s, want %s", after, want)
	}
}

func TestConfigBehindALinkIsWrittenWhereItIs(t *testing.T) {
	real := filepath.Join(t.TempDir(), "real.yaml")
	writeText(t, real, replaced(t, "pickle_key: hunter2pickle", "pickle_key: generate"))
	t.Chdir(t.TempDir())
	if err := os.Symlink(real, "config.yaml"); err != nil {
		t.Fatal(err)
	}
	c, err := load(t, LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(readText(t, real), c.Encryption.PickleKey.Reveal()) {
		t.Error("the key is not in the real file")
	}
	if info, err := os.Lstat("config.yaml"); err != nil || info.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link was replaced: %v", err)
	}
}

func TestConfigInAFolderThatCannotBeWrittenIsAnError(t *testing.T) {
	if os.Getuid() == 0 {
		t.Skip("root may write everywhere")
	}
	folder := t.TempDir()
	t.Chdir(folder)
	text := strings.Replace(completeConfig, "data/bot.db", filepath.Join(t.TempDir(), "bot.db"), 1)
	writeText(t, "config.yaml", strings.Replace(text, "    wait: 25s\n", "", 1))
	if err := os.Chmod(folder, 0o500); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Chmod(folder, 0o700) }) // so that it can be removed
	_, err := load(t, LoadOptions{})
	expectFaults(t, err, "config.yaml: cannot be rewritten: permission denied; let the program write it and its folder, or complete it yourself and use -n")
	if _, err = load(t, LoadOptions{ReadOnly: true}); err != nil {
		t.Error(err)
	}
}

func TestMissingDatabaseFolderIsMadeForTheOwnerOnly(t *testing.T) {
	for name, uri := range map[string]string{
		"relative":  "file:data/bot.db?_txlock=immediate",
		"absolute":  "file://FOLDER/data/bot.db",
		"localhost": "file://localhostFOLDER/data/bot.db",
		"plain":     "data/bot.db?_txlock=immediate",
		"escaped":   "file:d%61ta/bot.db",
	} {
		t.Run(name, func(t *testing.T) {
			folder := t.TempDir()
			t.Chdir(folder)
			writeText(t, "config.yaml", replaced(t, "file:data/bot.db?_txlock=immediate", strings.Replace(uri, "FOLDER", folder, 1)))
			_, err := load(t, LoadOptions{})
			if err != nil {
				t.Fatal(err)
			}
			info, err := os.Stat("data")
			if err != nil || info.Mode().Perm() != 0o700 {
				t.Fatalf("%v, %v", info, err)
			}
			if entries, err := os.ReadDir("data"); err != nil || len(entries) > 0 {
				t.Errorf("something was left in the folder: %v, %v", entries, err)
			}
		})
	}
}

func TestServersURIIsReadAndNeverShown(t *testing.T) {
	const server = "type: sqlite3-fk-wal-fullsync\n    uri: \"file:data/bot.db?_txlock=immediate\"\n"
	const uri = "postgres://bot:hunter2@db.example.com/bot?sslmode=require"
	t.Chdir(t.TempDir())
	c := mustLoad(t, replaced(t, server, "type: postgres\n    uri: \""+uri+"\"\n"))
	if c.Database.Type != Postgres || c.Database.URI.Reveal() != uri {
		t.Errorf("read %s", c.Database.Type)
	}
	if shown := fmt.Sprintf("%v %+v", c.Database, c); strings.Contains(shown, "hunter2@") {
		t.Errorf("shown: %s", shown)
	}
	for _, wrong := range []string{"postgres://bot:hunter2@db:port/bot", "postgres://bot:hunter2@%zz/bot", "host=db password=hunter2"} {
		writeText(t, "config.yaml", replaced(t, server, "type: postgres\n    uri: \""+wrong+"\"\n"))
		_, err := load(t, LoadOptions{})
		if err == nil || !strings.HasPrefix(err.Error(), "config.yaml: database.uri: ") || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", wrong, err)
		}
	}
}

func TestDatabaseInMemoryNeedsNoFolder(t *testing.T) {
	for _, uri := range []string{":memory:", "file::memory:?cache=shared", "file:x/y/z?mode=memory"} {
		mustLoad(t, replaced(t, "file:data/bot.db?_txlock=immediate", uri))
	}
}

func TestInvitesAreAllowedByGlob(t *testing.T) {
	for _, test := range []struct {
		allow []string
		user  id.UserID
		want  bool
	}{
		{nil, "@alice:example.com", false},
		{[]string{"@*:example.com"}, "@alice:example.com", true},
		{[]string{"@*:example.com"}, "@alice:sub.example.com", false},
		{[]string{"@*:example.com"}, "@alice:evil.org:example.com", false},
		{[]string{"@*:example.com"}, "alice:example.com", false},
		{[]string{"@alice:example.com", "@bob:example.com"}, "@bob:example.com", true},
		{[]string{"@alice:example.com"}, "@alice:example.com.evil.org", false},
		{[]string{"@al?ce:example.com"}, "@alice:example.com", true},
		{[]string{"*"}, "@anybody:anywhere", true},
		{[]string{"*"}, "", false},
	} {
		var c Config
		c.Invites.Allow = test.allow
		if got := c.InviteAllowed(test.user); got != test.want {
			t.Errorf("%v, %s: %v", test.allow, test.user, got)
		}
	}
}

func TestRecoveryKeyIsStoredInPlaceOfGenerate(t *testing.T) {
	const key = "EsTE s92N EtaX s2h6 VQYF 9Kao tHYL mkyL GKMh isZb KJ4E tvoC"
	text := replaced(t, `recovery_key: ""`, "recovery_key: generate # ours")
	c := mustLoad(t, text)
	if c.Account.RecoveryKey != Generate {
		t.Fatalf("Load changed the word to %q", c.Account.RecoveryKey.Reveal())
	}
	if err := c.StoreRecoveryKey(key); err != nil {
		t.Fatal(err)
	}
	if after := readText(t, "config.yaml"); after != strings.Replace(text, "generate # ours", `"`+key+`" # ours`, 1) {
		t.Errorf("wrong file:\n%s", after)
	}
	if info, err := os.Stat("config.yaml"); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if c.Account.RecoveryKey != key {
		t.Error("the config in memory has another key")
	}
	expectSameAgain(t, c)
	if err := c.StoreRecoveryKey(key); err == nil {
		t.Error("a second key was stored over the first")
	}
}

func TestRecoveryKeyIsNotStoredOverAnotherValue(t *testing.T) {
	c := mustLoad(t, replaced(t, `recovery_key: ""`, "recovery_key: generate"))
	for _, edited := range []string{completeConfig, replaced(t, `recovery_key: ""`, "recovery_key: generated"), "broken: [", "account: 5\n"} {
		writeText(t, "config.yaml", edited)
		err := c.StoreRecoveryKey("EsTE s92N")
		expectFaults(t, err, `config.yaml: account.recovery_key: no longer says "generate", so the key was not stored`)
		if readText(t, "config.yaml") != edited {
			t.Error("the file was changed")
		}
	}
}

func TestRecoveryKeyOfTheEnvironmentIsNotStored(t *testing.T) {
	text := replaced(t, `recovery_key: ""`, "recovery_key: generate")
	c := mustLoad(t, text, "SENDERTRUST_ACCOUNT__RECOVERY_KEY=EsTE s92N EtaX s2h6 VQYF 9Kao tHYL mkyL GKMh isZb KJ4E tvoC")
	if err := c.StoreRecoveryKey("EsTE s92N"); err == nil || strings.Contains(err.Error(), "EsTE") {
		t.Errorf("wrong error: %v", err)
	}
	if readText(t, "config.yaml") != text {
		t.Error("the file was changed")
	}
}

func TestSecretsAreNeverPrinted(t *testing.T) {
	c := mustLoad(t, strings.Replace(completeConfig, `access_token: ""`, "access_token: hunter2token", 1))
	encoded, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	texts := []string{string(encoded), toYAML(t, c)}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%t", "%10.3s"} {
		texts = append(texts, fmt.Sprintf(verb, c), fmt.Sprintf(verb, c.Account), fmt.Sprintf(verb, &c.Account.Password),
			fmt.Sprintf(verb, c.Account.Password), fmt.Sprintf(verb, []Secret{c.Account.Password}))
	}
	for _, text := range texts {
		if strings.Contains(text, secretPassword) || strings.Contains(strings.ToLower(text), fmt.Sprintf("%x", secretPassword)) {
			t.Errorf("a secret is shown: %s", text)
		}
	}
	if c.Account.Password.Reveal() != secretPassword || c.Account.Password.String() != "[redacted]" || Secret("").String() != "" {
		t.Error("the secret itself is lost, or is not shown as set")
	}
}

func FuzzConfig(f *testing.F) {
	example := exampleConfig(f)
	f.Add(completeConfig, "SENDERTRUST_INVITES__ALLOW=a")
	f.Add(example, "SENDERTRUST_ACCOUNT__PASSWORD=x")
	f.Add(`{"homeserver": {"address": "http://x"}, "account": {"user_id": "@a:b", "password": "p"}}`, "")
	f.Add("homeserver: {address: http://x}\r\naccount:\r\n  {user_id: '@a:b', password: |\r\n  p}\r\n", "SENDERTRUST_LOGGING__WRITERS=[{type: stdout}]")
	f.Add("homeserver:\n address: http://x\naccount:\n user_id: \"@a:b\"\n password: >+\n  p\n\nencryption: # x\n...\n", "SENDERTRUST_X")
	f.Fuzz(func(t *testing.T, text, variable string) {
		if strings.Contains(variable, "_FILE=") {
			t.Skip("would read any file")
		}
		r := readConfig("config.yaml", []byte(text), []string{variable})
		if len(r.faults) > 0 {
			for _, fault := range r.faults {
				if fault == "" || strings.ContainsAny(fault, "\n\r") {
					t.Errorf("fault is not one line: %q", fault)
				}
			}
			return
		}
		c := r.config
		if !isFullUserID(c.Account.UserID) || c.Homeserver.Address == "" || c.Encryption.PickleKey == "" ||
			c.Encryption.Wait < 0 || c.Encryption.Wait > MaxWait || c.Account.Password == "" && c.Account.AccessToken == "" {
			t.Errorf("accepted: %+v", c)
		}
		completed := addMissingKeys([]byte(text), example, r.fromEnvironment)
		again := readConfig("config.yaml", completed, []string{variable})
		if len(again.faults) > 0 || toYAML(t, again.config) != toYAML(t, c) {
			t.Fatalf("adding keys changed the settings: %q", completed)
		}
		if twice := addMissingKeys(completed, example, r.fromEnvironment); string(twice) != string(completed) {
			t.Errorf("keys were added twice: %q", twice)
		}
		if written := replaceGenerate(completed, pickleKey, "key"); written != nil {
			again = readConfig("config.yaml", written, []string{variable})
			if len(again.faults) > 0 || !r.fromEnvironment(pickleKey) && again.config.Encryption.PickleKey != "key" {
				t.Errorf("writing the key failed: %q", written)
			}
		}
	})
}
