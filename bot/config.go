package bot

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/rs/zerolog"
	"go.mau.fi/util/glob"
	"go.mau.fi/util/ptr"
	"go.mau.fi/util/random"
	"go.mau.fi/zeroconfig"
	"maunium.net/go/mautrix/crypto/utils"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// Postgres is the value of database.type for a PostgreSQL server.
const Postgres = "postgres"

// The values of annotate.mode.
const (
	ModeReply    = "reply"    // every message is answered
	ModeWarnings = "warnings" // only messages with a warning are answered
	ModeReaction = "reaction" // every message gets a reaction
	ModeCommand  = "command"  // only who asks is answered
)

// Modes are all of them.
var Modes = []string{ModeReply, ModeWarnings, ModeReaction, ModeCommand}

// The values of annotate.shields: whether a sender who is not verified is shown without a warning.
const (
	ShieldsLax    = "lax"
	ShieldsStrict = "strict"
)

// Generate is the word that a secret has in the config file when the program is to make it up and write it there.
const Generate = "generate"

// The keys whose value may be Generate.
const (
	recoveryKey = "account.recovery_key"
	pickleKey   = "encryption.pickle_key"
)

// MaxWait is the longest time that encryption.wait may name.
const MaxWait = 10 * time.Minute

const maxConfigSize = 1 << 20

// Config holds the settings. Its shape is that of config.example.yaml, where each setting is explained.
type Config struct {
	Homeserver struct {
		Address string `yaml:"address"`
	} `yaml:"homeserver"`

	Account struct {
		UserID        id.UserID   `yaml:"user_id"`
		Password      Secret      `yaml:"password"`
		AccessToken   Secret      `yaml:"access_token"`
		DeviceID      id.DeviceID `yaml:"device_id"`
		RecoveryKey   Secret      `yaml:"recovery_key"` // empty, a base58 recovery key, or Generate: see StoreRecoveryKey
		ResetIdentity bool        `yaml:"reset_identity"`
	} `yaml:"account"`

	Database struct {
		Type string `yaml:"type"` // the name of dbutil's driver for SQLite, or Postgres
		URI  Secret `yaml:"uri"`  // a server's holds a password
	} `yaml:"database"`

	Encryption struct {
		PickleKey Secret        `yaml:"pickle_key"` // never empty and never Generate after Load
		Wait      time.Duration `yaml:"wait"`       // how long an undecryptable message waits for its key before it is answered
	} `yaml:"encryption"`

	Invites struct {
		Allow []string `yaml:"allow"` // globs on user IDs: see InviteAllowed
	} `yaml:"invites"`

	Annotate struct {
		Mode    string `yaml:"mode"`    // one of Modes: see Bot.mode
		Shields string `yaml:"shields"` // ShieldsLax or ShieldsStrict
		// Language is one of Languages, and so are those of the rooms that have another one.
		Language      string               `yaml:"language"`
		RoomLanguages map[id.RoomID]string `yaml:"room_languages"`
	} `yaml:"annotate"`

	Trust struct {
		Requirement   string                   `yaml:"requirement"` // untrusted, cross_signed_or_legacy or cross_signed
		Operators     []id.UserID              `yaml:"operators"`
		VerifiedUsers map[id.UserID]id.Ed25519 `yaml:"verified_users"` // pinned master keys: 32 bytes, unpadded base64, after Load
	} `yaml:"trust"`

	Limits struct {
		AnswersPerSender  int `yaml:"answers_per_sender"` // a minute, in all rooms
		AnswersPerRoom    int `yaml:"answers_per_room"`   // a minute
		EditsPerRoom      int `yaml:"edits_per_room"`     // a minute
		InvitesPerSender  int `yaml:"invites_per_sender"` // an hour
		Invites           int `yaml:"invites"`            // a minute
		QueuedEvents      int `yaml:"queued_events"`      // this one and those below: see cryptohook.Limits
		WaitingPerSender  int `yaml:"waiting_per_sender"`
		WaitingPerRoom    int `yaml:"waiting_per_room"`
		LatePerSender     int `yaml:"late_per_sender"`
		ToDeviceBytes     int `yaml:"to_device_bytes"`
		SearchesPerSender int `yaml:"searches_per_sender"`
		SearchesPerRoom   int `yaml:"searches_per_room"`
	} `yaml:"limits"`

	Metrics struct {
		Listen string `yaml:"listen"` // host and port; empty: no metrics
	} `yaml:"metrics"`

	Logging zeroconfig.Config `yaml:"logging"`

	path string // of the file that the settings came from
}

// defaultConfig holds what a key is that neither the file nor the environment names.
// config.example.yaml says the same: a test compares them.
func defaultConfig() *Config {
	var c Config
	c.Database.Type = "sqlite3-fk-wal-fullsync"
	c.Database.URI = "file:data/sendertrust.db?_txlock=immediate"
	c.Encryption.PickleKey = Generate
	c.Encryption.Wait = 25 * time.Second
	c.Annotate.Mode = ModeReply
	c.Annotate.Shields = ShieldsLax
	c.Annotate.Language = Languages[0]
	c.Trust.Requirement = "untrusted"
	c.Limits.AnswersPerSender, c.Limits.AnswersPerRoom, c.Limits.EditsPerRoom = 60, 300, 10
	c.Limits.InvitesPerSender, c.Limits.Invites = 100, 60
	hook := cryptohook.DefaultLimits()
	c.Limits.QueuedEvents, c.Limits.WaitingPerSender, c.Limits.WaitingPerRoom = hook.QueuedEvents, hook.WaitingPerSender, hook.WaitingPerRoom
	c.Limits.LatePerSender, c.Limits.ToDeviceBytes = hook.LatePerSender, hook.ToDeviceBytes
	c.Limits.SearchesPerSender, c.Limits.SearchesPerRoom = hook.SearchesPerSender, hook.SearchesPerRoom
	c.Logging.MinLevel = ptr.Ptr(zerolog.InfoLevel)
	return &c
}

// Secret is a setting that nobody may read by accident: however it is printed, logged or encoded, it shows only whether
// it is set. Reveal returns what it is.
type Secret string

// Reveal returns the secret itself.
func (s Secret) Reveal() string { return string(s) }

// String returns "[redacted]", or nothing if the secret is empty.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return "[redacted]"
}

// Format implements [fmt.Formatter]: no verb prints the secret.
func (s Secret) Format(state fmt.State, _ rune) { _, _ = io.WriteString(state, s.String()) }

// MarshalText implements [encoding.TextMarshaler], and with it the JSON and YAML encodings, as String does.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// ConfigError tells what is wrong with the settings.
type ConfigError struct {
	Faults []string // one line for each, ready to be shown: where it is, which key, what is wrong, what would be right
}

// Error returns all faults, one a line. It never contains a secret.
func (e *ConfigError) Error() string { return strings.Join(e.Faults, "\n") }

func configFault(format string, args ...any) *ConfigError {
	return &ConfigError{Faults: []string{fmt.Sprintf(format, args...)}}
}

// LoadOptions are the circumstances under which Load reads a config.
type LoadOptions struct {
	Example  string   // the text of config.example.yaml: keys that the file lacks are added from it, with their explanations
	ReadOnly bool     // the file is never written; a secret that would have to be generated is then an error
	Environ  []string // in the form of os.Environ, which is used if this is nil
}

// Load reads the config file at path, lets the environment override it, and checks every setting. Then it writes the
// file back if it lacked keys or had secrets to generate: nothing else in the file changes, not a byte, and what came
// from the environment is not written. The folder of an SQLite database is created if only that is missing.
//
// The error is a *[ConfigError].
func Load(path string, options LoadOptions) (*Config, error) {
	text, fault := readConfigFile(path)
	if fault != nil {
		return nil, fault
	}
	environ := options.Environ
	if environ == nil {
		environ = os.Environ()
	}
	r := readConfig(path, text, environ)
	r.checkDatabaseFile()
	if len(r.faults) > 0 {
		return nil, &ConfigError{r.faults}
	}
	c := r.config
	c.path = path
	if options.ReadOnly {
		if err := r.refuseGenerate(); err != nil {
			return nil, err
		}
		return c, nil
	}
	completed := addMissingKeys(text, options.Example, r.fromEnvironment)
	if c.Encryption.PickleKey == Generate {
		c.Encryption.PickleKey = Secret(random.String(64))
		if completed = replaceGenerate(completed, pickleKey, c.Encryption.PickleKey); completed == nil {
			return nil, configFault(`%s: encryption.pickle_key: cannot be written to this file; add the key to the section "encryption" yourself, with a long random value`, path)
		}
	}
	if bytes.Equal(completed, text) {
		return c, nil
	}
	if err := writeConfigFile(path, completed); err != nil {
		return nil, configFault("%s: cannot be rewritten: %v; let the program write it and its folder, or complete it yourself and use -n", path, withoutPath(err))
	}
	return c, nil
}

// StoreRecoveryKey writes key to the config file in place of the word "generate" at account.recovery_key.
// Any other value there is left alone, and is an error.
func (c *Config) StoreRecoveryKey(key string) error {
	if c.Account.RecoveryKey != Generate {
		return errors.New(`account.recovery_key: the key was not stored: the settings do not say "generate" there`)
	}
	text, fault := readConfigFile(c.path)
	if fault != nil {
		return fault
	}
	if text = replaceGenerate(text, recoveryKey, Secret(key)); text == nil {
		return configFault(`%s: account.recovery_key: no longer says "generate", so the key was not stored`, c.path)
	}
	if err := writeConfigFile(c.path, text); err != nil {
		return configFault("%s: account.recovery_key: the key could not be stored: %v", c.path, withoutPath(err))
	}
	c.Account.RecoveryKey = Secret(key)
	return nil
}

// InviteAllowed reports whether invites.allow lets this user bring the bot into a room.
func (c *Config) InviteAllowed(user id.UserID) bool {
	if !isFullUserID(user) {
		return false
	}
	return slices.ContainsFunc(c.Invites.Allow, func(pattern string) bool {
		compiled := glob.Compile(pattern)
		return compiled != nil && compiled.Match(string(user))
	})
}

// validate checks what each setting says; its form was checked when it was read.
func (r *configReader) validate() {
	c := r.config
	r.checkAddress()
	r.checkUserID("account.user_id", c.Account.UserID)
	if c.Account.Password == "" && c.Account.AccessToken == "" && !r.misunderstood("account.access_token") {
		r.fault("account.password", "is missing, and account.access_token too; write one of the two")
	}
	if key := c.Account.RecoveryKey; key != "" && key != Generate && utils.DecodeBase58RecoveryKey(key.Reveal()) == nil {
		r.fault(recoveryKey, `is not a recovery key; write the 48 letters and digits, in groups of four, that begin with "Es" (a passphrase does not do), or generate, or ""`)
	}
	r.checkDatabase()
	if c.Encryption.PickleKey == "" {
		r.fault(pickleKey, "is empty; write generate, and the program makes a key")
	}
	if c.Encryption.Wait < 0 || c.Encryption.Wait > MaxWait {
		r.fault("encryption.wait", "%q is out of range; write a time from 0s to 10m, for example 25s", c.Encryption.Wait)
	}
	for _, pattern := range c.Invites.Allow {
		r.checkInviteGlob(pattern)
	}
	r.checkChoice("annotate.mode", c.Annotate.Mode, Modes...)
	r.checkChoice("annotate.shields", c.Annotate.Shields, ShieldsLax, ShieldsStrict)
	r.checkLanguages()
	r.checkChoice("trust.requirement", c.Trust.Requirement, "untrusted", "cross_signed_or_legacy", "cross_signed")
	for _, user := range c.Trust.Operators {
		r.checkUserID("trust.operators", user)
	}
	r.checkVerifiedUsers()
	r.checkLimits()
	if listen := c.Metrics.Listen; listen != "" && !isListenAddress(listen) {
		r.fault("metrics.listen", `%s is not an address with a port; write for example 127.0.0.1:9100, or ""`, quoteValue(listen))
	}
	for _, writer := range c.Logging.Writers {
		r.checkChoice("logging.writers", string(writer.Type), "stdout", "stderr", "file", "syslog", "syslog-cee", "journald")
		if writer.Format != "" {
			r.checkChoice("logging.writers", string(writer.Format), "json", "pretty", "pretty-colored")
		}
	}
}

// The most that a limit may say. Nothing is gained by more, and a number beyond it is a slip of the finger.
const (
	mostCount     = 1_000_000
	leastToDevice = 8 << 10 // a room key takes 3 KiB
	mostToDevice  = 1 << 20
)

func (r *configReader) checkLimits() {
	limits := reflect.ValueOf(r.config.Limits)
	fields := yamlFields(limits.Type())
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		least, most := 1, mostCount
		if name == "to_device_bytes" {
			least, most = leastToDevice, mostToDevice
		}
		if value := int(limits.FieldByIndex(fields[name].Index).Int()); value < least || value > most {
			r.fault("limits."+name, "%d is out of range; write a number from %d to %d", value, least, most)
		}
	}
}

// hookLimits are the limits of what the hook holds and does.
func (c *Config) hookLimits() cryptohook.Limits {
	return cryptohook.Limits{
		QueuedEvents: c.Limits.QueuedEvents, WaitingPerSender: c.Limits.WaitingPerSender, WaitingPerRoom: c.Limits.WaitingPerRoom,
		LatePerSender: c.Limits.LatePerSender, ToDeviceBytes: c.Limits.ToDeviceBytes,
		SearchesPerSender: c.Limits.SearchesPerSender, SearchesPerRoom: c.Limits.SearchesPerRoom,
	}
}

// isListenAddress says whether a program can be asked to listen there: a host or nothing, and a port.
func isListenAddress(address string) bool {
	host, port, err := net.SplitHostPort(address)
	if err != nil || strings.ContainsAny(host, "/ \t") {
		return false
	}
	_, err = strconv.ParseUint(port, 10, 16)
	return err == nil
}

func (r *configReader) checkAddress() {
	const right = "write for example http://127.0.0.1:8008"
	address := r.config.Homeserver.Address
	parsed, err := url.Parse(address)
	switch {
	case address == "":
		r.fault("homeserver.address", "is missing; "+right)
	case strings.Contains(address, "@"):
		r.fault("homeserver.address", "contains a user name or password; "+right)
	case err != nil || (parsed.Scheme != "http" && parsed.Scheme != "https"):
		r.fault("homeserver.address", "%s is not an http or https URL; "+right, quoteValue(address))
	case parsed.Hostname() == "" || !validPort(parsed):
		r.fault("homeserver.address", "%s names no server that can be reached; "+right, quoteValue(address))
	case parsed.RawQuery != "" || parsed.Fragment != "":
		r.fault("homeserver.address", "%s has a part after ? or #; "+right, quoteValue(address))
	}
}

// validPort reports whether the port of a URL is one, or left to the scheme.
func validPort(address *url.URL) bool {
	port, err := strconv.Atoi(address.Port())
	return !strings.HasSuffix(address.Host, ":") && (address.Port() == "" || err == nil && port > 0 && port < 1<<16)
}

func (r *configReader) checkUserID(key string, user id.UserID) {
	if user == "" {
		r.fault(key, "is missing; write a full Matrix ID, for example @bot:example.com")
	} else if !isFullUserID(user) {
		r.fault(key, "%s is not a full Matrix ID; write for example @bot:example.com", quoteValue(string(user)))
	}
}

func isFullUserID(user id.UserID) bool {
	localpart, _, err := user.ParseAndValidateRelaxed()
	return err == nil && localpart != "" && utf8.ValidString(localpart) && !strings.ContainsAny(localpart, " \t\r\n\x00")
}

var sqliteTypes = []string{"sqlite3-fk-wal-fullsync", "sqlite3-fk-wal"}

// checkDatabase finds out whether the type is known, and a server's URI one. Whether the server answers shows later.
func (r *configReader) checkDatabase() {
	const right = "write for example postgres://sendertrust:password@localhost/sendertrust"
	database := r.config.Database
	if database.Type != Postgres {
		r.checkChoice("database.type", database.Type, slices.Concat(sqliteTypes, []string{Postgres})...)
		return
	}
	uri := database.URI.Reveal()
	if !strings.HasPrefix(uri, "postgres://") && !strings.HasPrefix(uri, "postgresql://") {
		r.fault("database.uri", "is not the URI of a PostgreSQL database; "+right)
	} else if db, err := cryptohook.OpenPostgres(uri); err != nil {
		r.fault("database.uri", "cannot be understood: %v; "+right, err)
	} else {
		_ = db.Close()
	}
}

// checkDatabaseFile finds out whether the SQLite file can be written, and creates its folder if only that is missing.
func (r *configReader) checkDatabaseFile() {
	const key = "database.uri"
	if r.misunderstood(key) || !slices.Contains(sqliteTypes, r.config.Database.Type) {
		return
	}
	file, err := sqliteFile(r.config.Database.URI.Reveal())
	if err != nil {
		r.fault(key, "%v; write for example file:data/sendertrust.db?_txlock=immediate", err)
		return
	}
	if file == ":memory:" {
		return
	}
	folder := filepath.Dir(file)
	if _, err = os.Stat(folder); errors.Is(err, fs.ErrNotExist) {
		if len(r.faults) > 0 {
			return
		}
		if err = os.Mkdir(folder, 0o700); err != nil {
			r.fault(key, "the folder %s is missing and cannot be made: %v; make it yourself, or name another", quoteValue(folder), withoutPath(err))
			return
		}
	}
	if err = tryToWrite(folder); err != nil {
		r.fault(key, "the folder %s cannot be written: %v; give the bot's user the right to write there, or name another", quoteValue(folder), withoutPath(err))
		return
	}
	existing, err := os.OpenFile(file, os.O_RDWR, 0)
	if err == nil {
		_ = existing.Close()
	} else if !errors.Is(err, fs.ErrNotExist) {
		r.fault(key, "%s cannot be written: %v; give the bot's user the right to write it, or name another file", quoteValue(file), withoutPath(err))
	}
}

// sqliteFile returns the path of the file that an SQLite URI names, or ":memory:".
func sqliteFile(uri string) (string, error) {
	path, isURI := strings.CutPrefix(uri, "file:")
	path, query, _ := strings.Cut(path, "?")
	if isURI {
		path, _, _ = strings.Cut(path, "#")
		path = strings.TrimPrefix(path, "//localhost")
		if rest, ok := strings.CutPrefix(path, "//"); ok && strings.HasPrefix(rest, "/") {
			path = rest
		}
		unescaped, err := url.PathUnescape(path)
		if err != nil {
			return "", errors.New("is not an SQLite URI")
		}
		path = unescaped
	}
	switch {
	case path == ":memory:" || slices.Contains(strings.Split(query, "&"), "mode=memory"):
		return ":memory:", nil
	case path == "" || strings.Contains(path, "://") || strings.HasPrefix(path, "//") || strings.HasSuffix(path, "/") || strings.Contains(path, "\x00"):
		return "", errors.New("names no file") // without the value: a PostgreSQL URI would hold a password
	}
	return path, nil
}

func tryToWrite(folder string) error {
	probe, err := os.CreateTemp(folder, ".sendertrust-*")
	if err != nil {
		return err
	}
	_ = probe.Close()
	return os.Remove(probe.Name())
}

func (r *configReader) checkInviteGlob(pattern string) {
	const right = `write for example "@*:example.com"`
	switch {
	case glob.Compile(pattern) == nil:
		r.fault("invites.allow", "%s is not a pattern; "+right, quoteValue(pattern))
	case !strings.HasPrefix(pattern, "@") && !strings.HasPrefix(pattern, "*") && !strings.HasPrefix(pattern, "?"),
		!strings.ContainsAny(pattern, ":*?"):
		r.fault("invites.allow", "%s can never match a Matrix ID; "+right, quoteValue(pattern))
	}
}

func (r *configReader) checkLanguages() {
	r.checkChoice("annotate.language", r.config.Annotate.Language, Languages...)
	const key = "annotate.room_languages"
	rooms := r.config.Annotate.RoomLanguages
	for _, roomID := range slices.Sorted(maps.Keys(rooms)) {
		if !isRoomID(roomID) {
			r.fault(key, "%s is not the ID of a room; write for example !abcdefg:example.com, as the room's settings show it", quoteValue(string(roomID)))
		}
		if !slices.Contains(Languages, rooms[roomID]) {
			r.fault(key, "%s is not one of the languages; write %s", quoteValue(rooms[roomID]), strings.Join(Languages, " or "))
		}
	}
}

// isRoomID says whether a room can have such an ID. Newer ones name no server.
// https://spec.matrix.org/v1.16/appendices/#room-ids
func isRoomID(roomID id.RoomID) bool {
	opaque, isRoom := strings.CutPrefix(string(roomID), "!")
	return isRoom && opaque != "" && opaque[0] != ':' && len(roomID) <= 255 && utf8.ValidString(opaque) && !strings.ContainsAny(opaque, " \t\r\n\x00")
}

func (r *configReader) checkChoice(key, value string, choices ...string) {
	if !slices.Contains(choices, value) {
		last := len(choices) - 1
		r.fault(key, "%s is not one of the choices; write %s or %s", quoteValue(value), strings.Join(choices[:last], ", "), choices[last])
	}
}

func (r *configReader) checkVerifiedUsers() {
	pins := r.config.Trust.VerifiedUsers
	users := make([]id.UserID, 0, len(pins))
	for user := range pins {
		users = append(users, user)
	}
	slices.Sort(users)
	for _, user := range users {
		r.checkUserID("trust.verified_users", user)
		key, err := ParseMasterKey(string(pins[user]))
		if err != nil {
			r.fault("trust.verified_users", "the key of %s %v; write the user's master key: 43 letters, digits, + and /", quoteValue(string(user)), err)
		}
		pins[user] = key
	}
}

// ParseMasterKey reads a master key as people copy it, in groups with spaces between them, or with padding, into unpadded base64. The error
// ends a sentence that begins with the key.
func ParseMasterKey(text string) (id.Ed25519, error) {
	text = strings.TrimRight(strings.Join(strings.Fields(text), ""), "=")
	key, err := base64.RawStdEncoding.Strict().DecodeString(text)
	if err != nil {
		return "", errors.New("is not base64")
	}
	if len(key) != 32 {
		return "", fmt.Errorf("has %d bytes instead of 32", len(key))
	}
	return id.Ed25519(text), nil
}

// refuseGenerate returns the error that says which secrets would be lost because the file is not written.
func (r *configReader) refuseGenerate() error {
	const fault = `"generate" would be lost, because -n forbids to write the file; write the secret itself, or start once without -n`
	if r.config.Account.RecoveryKey == Generate {
		r.fault(recoveryKey, fault)
	}
	if r.config.Encryption.PickleKey == Generate {
		r.fault(pickleKey, fault)
	}
	if len(r.faults) == 0 {
		return nil
	}
	return &ConfigError{r.faults}
}

func readConfigFile(path string) ([]byte, *ConfigError) {
	text, err := readSmallFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, configFault("%s: is not there; make it with: sendertrust -e -c %s", path, path)
	} else if err != nil {
		return nil, configFault("%s: cannot be read: %v", path, withoutPath(err))
	}
	return text, nil
}

func readSmallFile(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxConfigSize+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxConfigSize {
		return nil, errors.New("it is larger than 1 MiB")
	}
	return text, nil
}

// writeConfigFile replaces the file at path, or the one that a link there leads to, so that at any moment it is either the
// old one or the new one. Only its owner may read it.
func writeConfigFile(path string, text []byte) (err error) {
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return err
	}
	folder := filepath.Dir(path)
	temp, err := os.CreateTemp(folder, ".sendertrust-config-*") // with mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name()) // fails once it is renamed
	_, err = temp.Write(text)
	if err = errors.Join(err, temp.Sync(), temp.Close()); err != nil {
		return err
	}
	if err = os.Rename(temp.Name(), path); err != nil {
		return err
	}
	opened, err := os.Open(folder)
	if err != nil {
		return err
	}
	return errors.Join(opened.Sync(), opened.Close())
}

// withoutPath returns the cause of a file error: the path in it may be a secret that was written into the wrong place.
func withoutPath(err error) error {
	if pathError, ok := errors.AsType[*fs.PathError](err); ok {
		return pathError.Err
	}
	if linkError, ok := errors.AsType[*os.LinkError](err); ok {
		return linkError.Err
	}
	return err
}
