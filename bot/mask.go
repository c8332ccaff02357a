package bot

import (
	"encoding/json"
	"io"
	"net/url"
	"strings"
	"sync/atomic"

	"github.com/rs/zerolog"
)

// shortestMasked is the shortest secret that is masked, in bytes. A shorter one is part of other words, and would make them unreadable.
const shortestMasked = 8

// Mask keeps the bot's own secrets out of what it writes, whoever put them there. The bot itself writes none; but the errors that it logs
// hold words of others, such as the homeserver's, which knows the password and the token and might repeat them. A nil Mask hides nothing.
type Mask struct {
	// replacer is nil while nothing is hidden.
	replacer atomic.Pointer[strings.Replacer]
	// hidden are the secrets, as they are and as they are written in JSON, each before what it is replaced by.
	hidden []string
}

// NewMask makes a mask that hides the secrets of the configuration.
func NewMask(config *Config) *Mask {
	mask := new(Mask)
	secrets := []Secret{
		config.Account.Password, config.Account.AccessToken, config.Account.RecoveryKey, config.Encryption.PickleKey,
	}
	if uri, err := url.Parse(config.Database.URI.Reveal()); err == nil && uri.User != nil {
		password, _ := uri.User.Password()
		secrets = append(secrets, Secret(password))
	}
	for _, secret := range secrets {
		mask.Hide(secret)
	}
	return mask
}

// Hide adds a secret. It must not be called by two at the same time.
func (m *Mask) Hide(secret Secret) {
	if m == nil || len(secret) < shortestMasked || secret == Generate {
		return
	}
	m.hidden = append(m.hidden, secret.Reveal(), secret.String(), inJSON(secret.Reveal()), secret.String())
	m.replacer.Store(strings.NewReplacer(m.hidden...))
}

// inJSON writes a text as log lines do.
func inJSON(text string) string {
	var written strings.Builder
	encoder := json.NewEncoder(&written)
	encoder.SetEscapeHTML(false)
	_ = encoder.Encode(text) // a string always can be
	return strings.TrimSuffix(strings.TrimPrefix(written.String(), `"`), "\"\n")
}

// Writer gives a writer to which each secret that is written in one go is "[redacted]".
func (m *Mask) Writer(to io.Writer) zerolog.LevelWriter {
	if writer, ok := to.(zerolog.LevelWriter); ok {
		return maskWriter{writer, m}
	}
	return maskWriter{zerolog.LevelWriterAdapter{Writer: to}, m}
}

type maskWriter struct {
	to   zerolog.LevelWriter
	mask *Mask
}

func (w maskWriter) Write(line []byte) (int, error) { return w.written(line, w.to.Write) }

// WriteLevel implements [zerolog.LevelWriter].
func (w maskWriter) WriteLevel(level zerolog.Level, line []byte) (int, error) {
	return w.written(line, func(masked []byte) (int, error) { return w.to.WriteLevel(level, masked) })
}

func (w maskWriter) written(line []byte, write func([]byte) (int, error)) (int, error) {
	if w.mask == nil {
		return write(line)
	}
	replacer := w.mask.replacer.Load()
	if replacer == nil {
		return write(line)
	}
	if _, err := write([]byte(replacer.Replace(string(line)))); err != nil {
		return 0, err
	}
	return len(line), nil
}
