package cryptohook

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

func TestDatabaseLogHoldsNoValues(t *testing.T) {
	var written bytes.Buffer
	log := zerolog.New(&written).Level(zerolog.TraceLevel)
	DatabaseLog(log).QueryTiming(log.WithContext(t.Context()), "Exec", "INSERT INTO secrets VALUES ($1)", []any{"hunter2"}, 1, time.Minute, errors.New("slow"))
	if !strings.Contains(written.String(), "INSERT INTO secrets") {
		t.Errorf("a slow query was not logged: %s", written.String())
	}
	if strings.Contains(written.String(), "hunter2") {
		t.Errorf("a value was logged: %s", written.String())
	}
}
